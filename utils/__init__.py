"""The rooms of the pipeline; each name is imported from the module that owns it.

tiling       integer geometry of tiles: origins, the part of a tile that is its own
raster       scenes: opening, masks, windows, GeoTIFF output
labels       label rasters on a scene's grid
data         the tile cache: prepare, verify, splits, augmentation, loading
losses       CE + Dice over labelled pixels
metrics      confusion matrix → IoU and Dice
optim        Muon + AdamW in one optimizer, OneCycle, early stopping
engine       the training loop
inference    sliding windows, flips and blending, streamed from disk to disk
checkpoint   weights with everything needed to use them again
distributed  ranks, devices, sharing of work
logging      messages, timed blocks, progress
landscape    a synthetic countryside with its exact class map
demo         a self-contained demo project, and the report on its map
"""
