"""The rooms of the pipeline; each name is imported from the module that owns it.

artefacts     files that are whole or absent
limits        how much is read of a file, text shown as one line
records       whether what a file gives has the types declared
claims        whether what a manifest or checkpoint says of itself can be
formats       which drivers a raster's ending allows, what its header may claim
vrt           what a VRT may name
locks         one run at a time in a folder
space         room on the disk before something is written
streaming     threads that read ahead and write behind
tiling        integer geometry of tiles: origins, the part of a tile that is its own
grids         where pixels lie: CRS, transform, size
opening       rasters opened by the driver of their ending, within bounds
raster        one scene on disk: bands, masks, windows, read tile by tile
block_cache   how many decoded blocks GDAL holds
scenes        which files are scenes, which bands are read, what their values mean
vectors       polygons on disk
burning       polygons burnt on a grid, window by window
warping       a label raster's pixels under a scene's
label_values  what raster values and attributes mean
label_rasters label rasters on a scene's grid
labels        all label files of a scene: which count where, and what they may hold
turns         the eight ways to lay a tile
quantize      features rounded as they are cached
manifest      what a cache is, and what other settings differ from it in
archives      what torch.save wrote, read without running code
cache         the tiles of a cache on disk, and what makes one sound
pace          which kind of cache is the quicker one here, measured
sources       the scenes and labels of a cache, and what it is to be
prepare       scenes and labels → cached tiles
data          verify, samples, augmentation, an epoch's order
loading       batches, made by threads ahead of training
footprints    where tiles lie on the ground
blocks        blocks of ground to hold out
splits        sides by lists, regions or blocks, and their audit
sampling      the order in which tiles are drawn
losses        CE + Dice over labelled pixels
metrics       confusion matrix → IoU and Dice
optim         Muon + AdamW in one optimizer, OneCycle, early stopping
resume        where training stands, on disk
divergence    what is no number in training, and on which tiles
step          a step of training: accumulation, precision, clipping, averaged weights
keeping       what a training keeps: where it stands, its best weights
engine        the loop over epochs, validation, when to stop
blending      overlapping tiles → one field of probabilities
products      the rasters of a map, from finished pixels
journal       finished rows of a map that is still being made
outputs       where maps go, over nothing that is to stay, and which are finished
inference     scenes → maps, streamed from disk to disk
maps          maps on disk: COG, colours, names, tags
ground        a grid's pixels on the Earth: metres, true areas
regions       the connected regions of a map, and their sieve
polygons      maps as polygons
checkpoint    weights with everything needed to use them again
agreement     settings against what a cache or weights were made with
devices       which device is used, in what precision, what goes up and comes down
distributed   ranks, sharing of work
logging       messages, timed blocks, progress
process       threads, imports, signals, parent and workers, exit codes
status        how a run stands, for batch scripts
strict_yaml, key_faults, key_rules    what config.py checks files with
preflight     what is looked at, and held, before the first phase
phases        networks and data work joined, a function for each phase
landscape     a synthetic countryside with its exact class map
demo          a self-contained demo project, and the report on its map
"""
