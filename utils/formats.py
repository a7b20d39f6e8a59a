"""Which raster formats are read: a file is opened by the drivers of its ending, and no others.

So a file never decides by its content what GDAL does with it, and nothing beyond this machine's own
files is ever opened. Sizes that a header claims are bounded before memory is taken for them.
"""

from pathlib import Path

FORMATS = {  # GDAL's drivers: the endings they are for
    ("GTiff",): (".tif", ".tiff", ".gtiff", ".cog", ".btf", ".tf8"),
    ("VRT",): (".vrt",),
    ("JP2OpenJPEG",): (".jp2", ".j2k", ".jpx", ".j2c"),
    ("PNG",): (".png",),
    ("JPEG",): (".jpg", ".jpeg"),
    ("BMP",): (".bmp",),
    ("GIF",): (".gif",),
    ("WEBP",): (".webp",),
    ("HFA", "ENVI", "EHdr"): (".img",),
    ("ENVI", "EHdr"): (".dat", ".bil", ".bip", ".bsq", ".bin", ".raw", ".envi", ".flt"),
    ("AAIGrid", "GRASSASCIIGrid"): (".asc",),
    ("NITF",): (".ntf", ".nitf"),
    ("netCDF",): (".nc",),
    ("DTED",): (".dt0", ".dt1", ".dt2"),
    ("SRTMHGT",): (".hgt",),
}
DRIVERS = {ending: drivers for drivers, endings in FORMATS.items() for ending in endings}
HEAD = 1024  # bytes of a file that tell what it is
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the two byte orders, BigTIFF too
KINDS = (  # how such files begin, what they are, the ending they should have
    (TIFF_STARTS, "a TIFF", ".tif"),
    ((b"\x89PNG\r\n",), "a PNG", ".png"),
    ((b"\xff\xd8\xff",), "a JPEG", ".jpg"),
    ((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), "a JPEG 2000", ".jp2"),
    ((b"GIF8",), "a GIF", ".gif"),
    ((b"EHFA_HEADER_TAG",), "an Erdas Imagine file", ".img"),
    ((b"NITF0", b"NSIF0"), "a NITF", ".ntf"),
    ((b"\x89HDF\r\n", b"CDF\x01", b"CDF\x02", b"CDF\x05"), "an HDF5 or netCDF file", ".nc"),
)
MOST_SIDE = 2**22  # rows or columns: 200 000 on each side is a large scene
MOST_PIXELS = 2**38  # a square of 524 288
MOST_BANDS = 4096
MOST_BLOCK = 2**30  # bytes that a block takes when it is decoded


def drivers_of(path: Path) -> tuple[str, ...]:
    """The drivers that may open a file by its ending; none where it is no raster's.

    >>> drivers_of(Path("north.TIF")), drivers_of(Path("notes.txt"))
    (('GTiff',), ())
    """
    return DRIVERS.get(path.suffix.lower(), ())


def kind_of(path: Path) -> tuple[str, str] | None:
    """What a raster is by its first bytes, and the ending such a file should have."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if b"<vrtdataset" in head.lower():
        return "a VRT", ".vrt"
    if b"<gdal_wms" in head.lower():
        return "a web service's description", ""
    return next(((what, end) for starts, what, end in KINDS if head.startswith(starts)), None)


def is_tiff(path: Path) -> bool:
    """Whether a file begins as a TIFF does."""
    with path.open("rb") as file:
        return file.read(4).startswith(TIFF_STARTS)


def false_ending(path: Path) -> str | None:
    """What to say of a raster that its ending passes off as another kind; None of other files."""
    found = kind_of(path)
    if found is None or (found[1] and drivers_of(path) == DRIVERS[found[1]]):
        return None
    kind, ending = found
    remedy = f"rename it to end in {ending}, or c" if ending else "c"
    said = f"ends in {path.suffix}" if path.suffix else "has no ending"
    return f"is {kind}, but {said}; {remedy}onvert it with gdal_translate"


def too_large(height: int, width: int, bands: int = 1, block: int = 0) -> str | None:
    """What a header claims beyond the limits, with the remedy; None of a size that is read.

    block: bytes of one block when it is decoded.

    >>> too_large(200_000, 200_000, bands=300, block=512 * 512 * 300)
    >>> too_large(2**31 - 1, 2**31 - 1)[:72]
    'its header claims 2147483647 × 2147483647 pixels, at most 4194304 a side'
    """
    if max(height, width) > MOST_SIDE or height * width > MOST_PIXELS:
        return (
            f"its header claims {height} × {width} pixels, at most {MOST_SIDE} a side and "
            f"{MOST_PIXELS} in all are read; is it whole? else cut it with gdal_translate -srcwin"
        )
    if bands > MOST_BANDS:
        return (
            f"its header claims {bands} bands, at most {MOST_BANDS} are read; is it whole? else "
            "choose some with gdal_translate -b"
        )
    if block > MOST_BLOCK:
        return (
            f"its header claims blocks of {block} bytes, at most {MOST_BLOCK} are decoded at once; "
            "is it whole? else write it in tiles with gdal_translate -co TILED=YES"
        )
    return None
