"""A page of MindSpore Hub: a Markdown file with a YAML header, and the rules that the hub's own code checks.

Two rules are ours, since their breach goes unnoticed there: no key twice, and version numbers in quotes (YAML reads
2.10 as 2.1). Whether a link leads anywhere is not checked: that needs a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from localmim.errors import UserError
from localmim.models.registry import list_models

REQUIRED = (
    "model-name",  # not on the hub's list, but its loader reads it
    "backbone-name",
    "module-type",
    "fine-tunable",
    "model-version",
    "author",
    "update-time",
    "repo-link",
    "user-id",
    "used-for",
    "mindspore-version",
    "license",
    "summary",
)
MODULE_TYPES = ("gnn", "rl", "audio", "cv", "cvtmodel", "nlp", "recommend", "cross", "hpc", "mm", "other")
USES = ("inference", "extract-feature", "transfer-learning")
# Those of the hub's list that are of use here.
DATASETS = ("imagenet2012", "imagenet", "cifar10", "cifar100", "coco2017", "ade20k")
FILE_FORMATS = ("air", "ckpt", "onnx", "mindir", "mslite")
COLON_ALLOWED = ("repo-link", "asset", "evaluation")
FENCE = "---"
REPO_LINK = re.compile(r"https?://[\w.-]+\.com/[\w.-]+/[\w.-]+(/tree/[\w.-]+(/[\w.-]+)+)?")
ASSET_LINK = re.compile(r"https?://[\w.-]+/[\w./%-]*[\w-]\.(ckpt|air|geir|meta|onnx)")


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error; the plain loader takes the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def check_page(path: str | Path) -> dict:
    """The header of the page at `path`.

    Raises:
        UserError: It cannot be read, or breaks a rule; names the first.
    """
    path = Path(path)
    if path.suffix != ".md":
        raise UserError(f"{path} is no page: expected a file that ends in .md")
    return check_text(read_page(path), str(path))


def read_page(path: Path) -> str:
    """The text of a page.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the page {path}: {getattr(error, 'strerror', None) or error}") from error


def check_text(text: str, where: str) -> dict:
    """The header of a page's text; `where` names the page in errors.

    Raises:
        UserError: It breaks a rule; names the first.
    """
    for problem in _problems(text):
        raise UserError(f"{where}: {problem}")
    return _header(text)


def with_asset(text: str, link: str, sha256: str) -> str:
    """The text of a page with this checkpoint as its only asset."""
    lines = text.splitlines(keepends=True)
    first, last = (i for i, line in enumerate(lines) if line.startswith(FENCE))
    kept, inside = [], False
    for line in lines[first + 1 : last]:
        if line[0].isalpha():  # a key of the header itself
            inside = line.startswith("asset:")
        if not inside:
            kept.append(line)
    asset = ["asset:\n", "  - file-format: ckpt\n", f"    asset-link: {link}\n", f'    asset-sha256: "{sha256}"\n']
    return "".join([*lines[: first + 1], *kept, *asset, *lines[last:]])


def _header(text: str) -> dict:
    """The header as a mapping; there are two fences."""
    lines = text.splitlines(keepends=True)
    first, last = (i for i, line in enumerate(lines) if line.startswith(FENCE))
    return yaml.load("".join(lines[first + 1 : last]), Loader=_Loader)  # a SafeLoader


def _problems(text: str) -> Iterator[str]:
    """What is wrong with a page, one line a broken rule; what comes later may rely on what came before."""
    fences = sum(line.startswith(FENCE) for line in text.splitlines())
    if fences != 2:
        yield f"{fences} lines begin with {FENCE}, expected two, around the header (no rule or table may begin so)"
    try:
        header = _header(text)
    except yaml.YAMLError as error:
        yield f"its header is not YAML: {' '.join(str(error).split())}"
    if not isinstance(header, dict):
        yield f"its header is not a mapping of keys to values but {header!r}"
    for key in REQUIRED:
        if header.get(key) in (None, ""):
            yield f"its header has no {key}"
    yield from _value_problems(header)
    if "asset" in header:
        yield from _asset_problems(header["asset"])
    for heading in _headings(text):
        if heading.endswith(":"):
            yield f"the heading {heading!r} ends with a colon"


def _value_problems(header: dict) -> Iterator[str]:
    """Rules of single keys other than `asset`."""
    for key in ("model-name", "module-type", "repo-link", "used-for", "summary"):
        if not isinstance(header[key], str):
            yield f"{key} is {header[key]!r}, expected text"
    for key in ("model-version", "mindspore-version"):
        if not isinstance(header[key], str):
            yield f"{key} is the number {header[key]}, expected text in quotes (2.10 would become 2.1)"
    if header["model-name"].lower() not in list_models():
        yield f"model-name {header['model-name']} is no registered model"
    if not isinstance(header["fine-tunable"], bool):
        yield f"fine-tunable is {header['fine-tunable']!r}, expected true or false"
    kind, *details = header["module-type"].lower().split("-")
    if kind not in MODULE_TYPES or len(details) > 1:
        yield f"module-type is {header['module-type']}, expected {', '.join(MODULE_TYPES)} and at most one -detail"
    for use in header["used-for"].split("/"):
        if use.lower() not in USES:
            yield f"used-for names {use!r}, expected {', '.join(USES)}, joined by /"
    for dataset in str(header.get("train-dataset", DATASETS[0])).split("_"):
        if dataset not in DATASETS:
            yield f"train-dataset names {dataset!r}, expected {', '.join(DATASETS)}, joined by _"
    accuracy = header.get("accuracy", 0)
    if isinstance(accuracy, bool) or not isinstance(accuracy, (int, float)):
        yield f"accuracy is {accuracy!r}, expected a number"
    if not REPO_LINK.fullmatch(header["repo-link"]):
        yield (
            f"repo-link is {header['repo-link']}, expected https://HOST.com/GROUP/REPO, with or without "
            "/tree/BRANCH/FOLDER: the last part is the folder with mindspore_hub_conf.py"
        )
    for key, value in header.items():
        if key not in COLON_ALLOWED and ":" in str(value):
            yield f"{key} has a colon in its value: {value}"


def _asset_problems(assets) -> Iterator[str]:
    """Rules of `asset`."""
    if not isinstance(assets, list) or not assets or not all(isinstance(asset, dict) for asset in assets):
        yield f"asset is {assets!r}, expected a list of files"
    for asset in assets:
        for key in ("asset-link", "asset-sha256", "file-format"):
            if asset.get(key) in (None, ""):
                yield f"an asset has no {key}"
        if str(asset["file-format"]).lower() not in FILE_FORMATS:
            yield f"file-format is {asset['file-format']}, expected one of {', '.join(FILE_FORMATS)}"
        sha256 = asset["asset-sha256"]
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-fA-F]{64}", sha256):
            yield f"asset-sha256 is {sha256!r}, expected 64 hexadecimal digits in quotes"
        if not ASSET_LINK.fullmatch(str(asset["asset-link"])):
            yield (
                f"asset-link is {asset['asset-link']}, expected an https address whose file ends in .ckpt, .air, "
                ".geir, .meta or .onnx: the hub downloads no other"
            )
    checkpoints = sum(str(asset["file-format"]).lower() == "ckpt" for asset in assets)
    if checkpoints != 1:
        yield f"{checkpoints} assets are of file-format ckpt, expected one: the hub uses the last"


def _headings(text: str) -> Iterator[str]:
    """Headings outside code blocks: lines that begin with #, or stand above a line of =."""
    code, above = False, ""
    for line in text.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            code = not code
        if code:
            continue
        if match := re.match(r" {0,3}#{1,6}\s+(.*?)\s*#*\s*$", line):
            yield match[1]
        elif re.fullmatch(r" {0,3}=+\s*", line) and above:
            yield above
        above = line.strip()
