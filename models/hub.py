"""A DINOv3 from the Hugging Face hub or a folder of its format: had within limits, or told why not.

Weights come from safetensors only, and no code from anywhere.
"""

import errno
import json
from pathlib import Path
from typing import Any

UNUSABLE = (  # what odd files raise
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
)  # fmt: skip
LONGEST_JSON = 2**20  # bytes
LARGEST = {  # numbers in config.json; the largest DINOv3 has 4096, 8192, 40, 32 and 4
    "hidden_size": 2**15,
    "intermediate_size": 2**17,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**10,
    "num_register_tokens": 2**12,
    "patch_size": 2**10,
    "image_size": 2**20,
    "num_channels": 2**12,
}
GATED = "https://huggingface.co/{name}"


class BackboneError(Exception):
    """A backbone that cannot be used; exit_code: 3 for a missing or damaged one, 4 where the hub or
    the system keeps it back."""

    def __init__(self, text: str, exit_code: int = 3) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def load_transformers() -> None:
    """Import all of transformers that a DINOv3 needs: about a second's work.

    >>> load_transformers()
    """
    from transformers import AutoConfig, AutoModel, DINOv3ViTModel  # noqa: F401


def from_hub(name: str, kind: Any, **options: Any) -> Any:
    """A config or model from a hub id or a local folder; trouble becomes one line that helps."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    require_folder(name)
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except (*UNUSABLE, SafetensorError, StrictDataclassError) as error:
        raise trouble(name, error) from error


def require_folder(name: str) -> None:
    """Refuse a local folder that is not there."""
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise BackboneError(f"{name}: no such folder (model.backbone)")


def trouble(name: str, error: BaseException) -> BackboneError:
    """What kept a backbone from loading, and the way out, in one line.

    >>> trouble("./vits16", ValueError("no JSON")).exit_code
    3
    >>> trouble("./vits16", PermissionError(13, "Permission denied")).exit_code
    4
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    kinds = {type(each).__name__ for each in chain}
    others = (
        "or set model.backbone to a local Hugging Face folder (config.json, model.safetensors) "
        "that starts with ./ or /"
    )
    if "GatedRepoError" in kinds or "gated repo" in str(error):
        return BackboneError(
            f"{name}: gated on the Hugging Face hub; request access at {GATED.format(name=name)}, "
            f"then run `hf auth login` or set HF_TOKEN, {others}",
            exit_code=4,
        )
    if "LocalEntryNotFoundError" in kinds or "couldn't connect" in str(error).lower():
        return BackboneError(
            f"{name}: not in the local Hugging Face cache and the hub cannot be reached; go online "
            f"(unset HF_HUB_OFFLINE if it is set), {others}",
            exit_code=4,
        )
    if "RepositoryNotFoundError" in kinds or "is not a valid model identifier" in str(error):
        return BackboneError(
            f"{name}: no such model on the Hugging Face hub, or a private one; check the name, "
            f"run `hf auth login` if it is yours, {others}",
            exit_code=4,
        )
    reason = " ".join(str(error).split())[:200]
    found = f"{type(error).__name__}: {reason}"
    said = f"{name}: cannot be loaded ({found}); mend that or download it again"
    refused = any(getattr(each, "errno", None) not in (None, errno.ENOENT) for each in chain)
    return BackboneError(said, exit_code=4 if refused else 3)


def require_possible(name: str) -> None:
    """Refuse a config.json of numbers that no backbone has, before memory is taken for them.

    Weights cannot have fewer bytes than numbers: a local folder's files tell what they can hold.
    """
    from transformers.utils import cached_file

    require_folder(name)
    try:
        own = own_json(Path(cached_file(name, "config.json") or name))
    except OSError:
        return  # what keeps it from being had is told where it is loaded
    except (ValueError, RecursionError) as error:
        raise trouble(name, error) from error
    for key, most in LARGEST.items():
        found = own.get(key, 0)
        if isinstance(found, int) and abs(found) > most:
            raise BackboneError(
                f"{name}: cannot be loaded (config.json has {key} {str(found)[:40]}, at most "
                f"{most} is read); download it again"
            )
    files = list(Path(name).glob("*.safetensors"))
    numbers, room = weights_claimed(own), sum(file.stat().st_size for file in files)
    if files and numbers > room:
        raise BackboneError(
            f"{name}: cannot be loaded (config.json calls for {numbers} weights, more than its "
            f".safetensors files have bytes, {room}); download it again"
        )


def own_json(path: Path) -> dict[str, Any]:
    """A JSON file of a backbone, which is a small one with an object in it."""
    if path.is_fifo():  # opening it would wait for who writes to it
        raise ValueError(f"{path.name} is a pipe")
    with path.open("rb") as file:
        text = file.read(LONGEST_JSON + 1)
    if len(text) > LONGEST_JSON:
        raise ValueError(f"{path.name} is larger than {LONGEST_JSON} bytes")
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content


def weights_claimed(own: dict[str, Any]) -> int:
    """The fewest numbers that the blocks of a config.json's network hold.

    >>> weights_claimed({"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12})
    21233664
    """
    sizes = [own.get(key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size")]
    if not all(isinstance(size, int) for size in sizes):
        return 0
    blocks, hidden, wide = sizes
    return blocks * hidden * (4 * hidden + 2 * wide)
