"""What a VRT may ask of GDAL: pixels of files of this machine, arranged, and nothing else.

A VRT is XML that can name web addresses, other drivers' commands and Python code. It is read here
before GDAL sees it, and GDAL's leniency is met with strictness: names of elements count in any
case, attributes like elements, and what this room does not know to be harmless is refused.
"""

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError, iterparse

from utils.limits import MEBIBYTE, limited_bytes, spelt_out

LARGEST = 64 * MEBIBYTE
DEEPEST = 32  # elements within each other
FILE_NAMES = {"sourcefilename", "sourcedataset"}
KINDS = {  # what subClass may say
    "vrtwarpeddataset", "vrtpansharpeneddataset", "vrtsourcedrasterband", "vrtwarpedrasterband",
    "vrtpansharpenedrasterband", "vrtderivedrasterband",
}  # fmt: skip
FORBIDDEN = {
    "pixelfunctioncode": "code",
    "pixelfunctionlanguage": "code",
    "dempath": "a file of elevations",
    "geoloctransformer": "files of places",
    "openoptions": "options of drivers",
    "group": "multidimensional arrays",
    "arraysource": "multidimensional arrays",
    "processingsteps": "processing steps",
}
WORDS = {"mdi", "srs", "wkt", "description", "gcps"}  # texts that name no file, whatever they say
DOMAINS = {"overviews", "geolocation", "vrt_sources", "new_vrt_sources"}  # metadata that name files


class VrtError(ValueError):
    """What a VRT may not hold."""


class Stated(NamedTuple):
    """A name, as elements and attributes have it, in lower case, and the text it is given."""

    name: str
    text: str


def sources_of(path: Path) -> tuple[Path, ...]:
    """The files that a VRT takes its pixels from; VrtError where it asks for anything else.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     web = Path(folder, "web.vrt")
    ...     _ = web.write_text("<a><SourceFilename>/vsicurl/a.tif</SourceFilename></a>")
    ...     sources_of(web)
    Traceback (most recent call last):
    utils.vrt.VrtError: names the source '/vsicurl/a.tif', only files of this machine are read
    """
    stat = path.stat()
    return _sources(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)  # every phase and thread opens it again
def _sources(path: Path, modified: int, size: int) -> tuple[Path, ...]:
    try:
        text = limited_bytes(path, LARGEST).decode("utf-8-sig")
    except ValueError as error:
        raise VrtError(f"cannot be read: {error}") from error
    if "<!" in text.replace("<!--", ""):
        raise VrtError("holds a DOCTYPE or CDATA, which no VRT needs")
    found: dict[Path, None] = {}
    for element in _elements(text):
        name = element.tag.casefold()
        if name in FILE_NAMES:
            found[_source(element, path.parent)] = None
        for stated in _statements(element):
            _require_harmless(*stated)
    return tuple(found)


def _elements(text: str) -> Iterator[Element]:
    """Every element once it is whole, the innermost first, with its children's names only."""
    inside: list[str] = []
    events = iterparse(io.BytesIO(text.encode()), ("start", "end", "comment", "pi"))
    try:
        for event, element in events:
            if event == "start":
                inside.append(element.tag.casefold())
            elif event == "end":
                yield element
                element.clear()
                inside.pop()
            elif inside and inside[-1] in FILE_NAMES:
                raise VrtError("holds a comment in the name of a file")
            if len(inside) > DEEPEST:
                raise VrtError(f"its elements lie over {DEEPEST} deep")
    except (ParseError, LookupError) as error:
        raise VrtError(f"is no XML ({error})") from error


def _statements(element: Element) -> Iterator[Stated]:
    if element.tag.startswith("{"):
        raise VrtError("has an XML namespace, which no VRT needs")
    for name, value in element.attrib.items():
        if name.casefold() in FILE_NAMES:
            raise VrtError(f"names a file by the attribute {name}")
        yield Stated(name.casefold(), value.strip())
    if element.tag.casefold() not in FILE_NAMES:
        yield Stated(element.tag.casefold(), (element.text or "").strip())


def _source(element: Element, folder: Path) -> Path:
    """The file that an element names, where it is a plain one that is there."""
    text = element.text or ""
    told = spelt_out(text if len(text) <= 200 else f"{text[:200]}...")
    relative = [v for k, v in element.attrib.items() if k.casefold() == "relativetovrt"] or ["0"]
    if len(element) or relative not in (["0"], ["1"]):
        raise VrtError(f"names the source '{told}' in a way that no program writes")
    path = (folder if relative == ["1"] else Path.cwd()) / text
    if text != text.strip() or str(path).startswith("/vsi") or "://" in text:
        raise VrtError(f"names the source '{told}', only files of this machine are read")
    try:
        there = path.is_file()
    except (OSError, ValueError):
        there = False
    if not there:
        raise VrtError(f"names the source '{told}', which is no file here")
    return path


def _require_harmless(name: str, text: str) -> None:
    shown = spelt_out(text[:200])
    if name in FORBIDDEN:
        raise VrtError(f"holds {FORBIDDEN[name]} ({name}), which is not read")
    if name == "subclass" and text.casefold() not in KINDS:
        raise VrtError(f"holds a {shown or 'nameless subclass'}, which is not read")
    if name == "domain" and text.casefold() in DOMAINS:
        raise VrtError(f"holds metadata of the domain {text}, which is not read")
    if name not in WORDS and ("/vsi" in text or "://" in text):
        raise VrtError(f"names '{shown}' ({name}), only files of this machine are read")
