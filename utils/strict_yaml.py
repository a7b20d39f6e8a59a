"""YAML read strictly, with the place of every key and value, for files that people write by hand.

Refused or named as a fault: doubled keys, tags, the words on which YAML 1.1 and 1.2 readers differ
(no, on, 12:30, 010). `1e-3` is a number. The only room that knows the yaml library.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from utils.limits import MEBIBYTE, limited_bytes, spelt_out

Keys = tuple[str | int, ...]  # ("train", "loss", "ce_weight"); a number counts within a list


class ConfigError(Exception):
    """Every fault of a config, one line each.

    >>> ConfigError(["config.yml:1:1: first", "config.yml:2:1: two\\nlines"]).faults[1]
    'config.yml:2:1: two\\\\nlines'
    """

    exit_code = 2

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = [spelt_out(fault) for fault in faults]
        super().__init__(self.faults)

    def __str__(self) -> str:
        return "\n".join(self.faults)


def named(keys: Keys) -> str:
    """The keys as a person writes them, without the numbers of list items."""
    return ".".join(key for key in keys if isinstance(key, str)) or "top level"


MAX_VALUES = 5000
MAX_DEPTH = 16  # sections and lists within each other: a config has five
MAX_BYTES = MEBIBYTE
DEEP = f"nested over {MAX_DEPTH} deep, as no config is"
MANY = f"over {MAX_VALUES} values, which no config has"
TAG = "tag:yaml.org,2002:"
FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$", re.ASCII)
SCALARS = {  # tag: (plain text that has it, conversion)
    TAG + "null": (re.compile(r"(~|null|)$", re.I), lambda text: None),
    TAG + "bool": (re.compile(r"(true|false)$", re.I), lambda text: text.lower() == "true"),
    TAG + "int": (re.compile(r"[-+]?(0|[1-9]\d{0,99})$", re.ASCII), int),
    TAG + "float": (FLOAT, float),
    TAG + "str": (re.compile(""), str),
}
SURPRISES = {  # tag: (plain text on which YAML 1.1 and 1.2 differ, remedy)
    "!switch": (re.compile(r"(y|n|yes|no|on|off)$", re.I), "write true or false, or quote it"),
    "!sixties": (re.compile(r"[-+]?\d+(:[0-5]?\d)+(\.\d*)?$", re.ASCII), "quote it"),
    "!octal": (re.compile(r"[-+]?0\d+$", re.ASCII), "drop the leading 0, or quote it"),
}


class ExcessError(yaml.MarkedYAMLError):
    """More of a text than any config has."""


class Loader(yaml.SafeLoader):
    """Knows true and false, null, decimal numbers and text; tags what YAML 1.1 reads otherwise."""

    yaml_implicit_resolvers = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        """A node as PyYAML has it; there may be so many, so deep."""
        self.nodes += 1
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExcessError(problem=DEEP, problem_mark=self.peek_event().start_mark)
        if self.nodes > 2 * MAX_VALUES:  # keys are nodes too
            raise ExcessError(problem=MANY, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Writer(yaml.SafeDumper):
    """Quotes text that this Loader or a YAML 1.1 reader would take for something else."""


for tag, (pattern, _) in (SURPRISES | SCALARS).items():
    if tag != TAG + "str":
        Loader.add_implicit_resolver(tag, pattern, None)
        Writer.add_implicit_resolver(tag, pattern, None)


def short(path: Path) -> str:
    """A path as faults name it: from the working directory where it lies below, else as given."""
    here = Path.cwd()
    return str(path.absolute().relative_to(here) if path.absolute().is_relative_to(here) else path)


def file_text(path: Path, name: str) -> str:
    """The text of a config file."""
    try:
        content = limited_bytes(path, MAX_BYTES)
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{name}: cannot read the config: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{name}:{line}:1: not UTF-8, expected a text file in UTF-8"]) from error
    except ValueError as error:
        raise ConfigError([f"{name}: cannot read the config: {error}"]) from error


def dump(data: dict) -> str:
    """YAML of plain values that this reader takes back unchanged; what does not show is escaped.

    >>> dump({"train": {"compile": False, "file": "no"}}).splitlines()
    ['train:', '  compile: false', "  file: 'no'"]
    """
    options = {"Dumper": Writer, "sort_keys": False, "width": 10_000}
    text = yaml.dump(data, allow_unicode=True, **options)
    shown = all(line.isprintable() for line in text.split("\n"))
    return text if shown else yaml.dump(data, allow_unicode=False, **options)


class Place(NamedTuple):
    """Where something was written; relative paths in it count from `folder`.

    In --set arguments the line is 0 and the column counts the arguments.
    """

    line: int
    column: int
    source: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    def at(self, mark: yaml.Mark) -> "Place":
        """This source at a mark of the YAML reader."""
        return self._replace(line=mark.line + 1, column=mark.column + 1) if self.line else self


def syntax_fault(error: yaml.YAMLError, text: str, origin: Place) -> str:
    """The fault of a text that is not YAML."""
    if isinstance(error, yaml.reader.ReaderError):
        line, column = text.count("\n", 0, error.position), text[: error.position].rfind("\n")
        mark = yaml.Mark("", error.position, line, error.position - column - 1, None, None)
        return f"{origin.at(mark)}: not valid YAML: found {chr(error.character)!r}"
    if isinstance(error, ExcessError):
        return f"{origin.at(error.problem_mark)}: {error.problem}"
    context = f"{error.context}, " if error.context else ""
    remedy = ", indent with spaces" if "'\\t'" in error.problem else ""
    return f"{origin.at(error.problem_mark)}: not valid YAML: {context}{error.problem}{remedy}"


@dataclass(slots=True)
class Draft:
    """A config while it is read: values, the place of each key and value, faults."""

    origin: Place
    data: object = None
    keys: dict[Keys, Place] = field(default_factory=dict)
    values: dict[Keys, Place] = field(default_factory=dict)
    faults: list[tuple[Place, str]] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)  # keys with an unfit value, dotted
    unknown: set[str] = field(default_factory=set)

    def read(self, text: str, origin: Place, keys: Keys = ()) -> object:
        """The value that a YAML text gives these keys."""
        try:
            node = Loader(text).get_single_node()
            self.keys[keys] = self.values[keys] = origin
            return None if node is None else self.value(node, origin, keys)
        except yaml.YAMLError as error:
            raise ConfigError([syntax_fault(error, text, origin)]) from error

    def value(self, node: yaml.Node, origin: Place, keys: Keys) -> object:
        """The value of a node; one that readers disagree on becomes a fault."""
        place = self.values[keys] = origin.at(node.start_mark)
        if len(self.values) > MAX_VALUES:  # a few aliases of aliases can stand for billions
            raise ConfigError([f"{place}: {MANY}"])
        if len(keys) > MAX_DEPTH:  # an alias may stand for what holds it
            raise ConfigError([f"{place}: {DEEP}"])
        if node.tag == TAG + "map":
            return self.mapping(node, origin, keys)
        if node.tag == TAG + "seq":
            return [self.value(item, origin, (*keys, i)) for i, item in enumerate(node.value)]
        pattern, convert = SCALARS.get(node.tag, (None, None))
        if pattern and isinstance(node, yaml.ScalarNode) and pattern.match(node.value):
            return convert(node.value)
        found = f"the tag {node.tag}, expected none"
        if node.tag in SURPRISES:
            found = f"{node.value}, on which YAML readers differ: {SURPRISES[node.tag][1]}"
        self.faulty.add(named(keys))
        self.faults.append((place, f"{named(keys)}: found {found}"))
        return None

    def mapping(self, node: yaml.MappingNode, origin: Place, keys: Keys) -> dict:
        """The section of a node; a doubled key, or one that is no text, becomes a fault."""
        section = {}
        for key_node, value_node in node.value:
            name, place = key_node.value, origin.at(key_node.start_mark)
            key = (*keys, name)
            if key_node.tag != TAG + "str" or not isinstance(name, str):
                found = name if isinstance(name, str) else "a list or section"
                self.faults.append((place, f"{named(keys)}: found the key {found}, expected text"))
            elif name in section:
                self.faults.append((place, f"{named(key)}: given twice, first at {self.keys[key]}"))
            else:
                self.keys[key] = place
                section[name] = self.value(value_node, origin, key)
        return section

    def override(self, argument: str, number: int) -> None:
        """Put the value of the --set argument of this number in place of the file's."""
        origin = Place(0, number, f"--set {argument}", Path.cwd())
        path, equals, text = argument.partition("=")
        keys = tuple(path.strip().split("."))
        if not equals or not all(keys) or len(keys) > MAX_DEPTH:
            self.faults.append((origin, "expected section.key=value"))
            return
        self.values = {at: place for at, place in self.values.items() if at[: len(keys)] != keys}
        value, section = self.read(text, origin, keys), self.data
        for depth, key in enumerate(keys[:-1], start=1):
            self.keys.setdefault(keys[:depth], origin)
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                self.faults.append((origin, f"{named(keys[:depth])} is a value and has no keys"))
                return
        section[keys[-1]] = value

    def error(self) -> ConfigError:
        """All faults: those of the file from top to bottom, then those of --set."""
        self.faults.sort(key=lambda fault: (fault[0].line == 0, fault[0].line, fault[0].column))
        return ConfigError([f"{place}: {text}" for place, text in self.faults])


def read_file(path: Path) -> Draft:
    """The draft of a config file, its faults noted; a file that is no YAML is an error."""
    draft = Draft(Place(1, 1, short(path), path.absolute().parent))
    draft.data = draft.read(file_text(path, short(path)), draft.origin)
    return draft
