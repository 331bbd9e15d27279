"""Fetch models from the Hugging Face hub and push folders to it. Only JSON and safetensors are ever fetched."""

import json
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mimkit.errors import UserError, reason_of

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
CODE_KEYS = ("auto_map", "custom_pipelines")  # keys by which a configuration asks to run code of its repository
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
DESCRIPTION = ("*.json", "README.md")  # fetched first: they show whether a repository asks to run code
FETCHED = (*DESCRIPTION, "*.safetensors")
DENSE = ("segmenter.json", "detector.json")
PUSHED = ("README.md", "config.json", *DENSE, *WEIGHTS, "report.json", "curves.png", "reconstructions.png", "decoder/*")
TIMEOUT = 10.0  # seconds for the first request; nothing is retried after it


def local_path(name: str | Path) -> Path:
    """Return the local path of a model or checkpoint, and fetch it first if it is `hf-hub:OWNER/NAME[@REVISION]`.

    Raises:
        UserError: the hub cannot be reached and the cache does not hold the repository, the repository does not exist,
            it asks to run its own code, or it has no safetensors.
    """
    prefix, _, repository = str(name).partition(":")
    if prefix.lower() in ("hf-hub", "hf_hub"):  # timm takes both
        return _fetch(repository)
    return Path(name).expanduser()


@cache
def _fetch(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    repository, _, revision = name.partition("@")
    _check_name(repository, f"hf-hub:{name}")
    disable_progress_bars()
    request: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    tags: list[str] = []
    unreachable: Exception | None = None
    try:
        try:
            tags = huggingface_hub.HfApi().model_info(**request, timeout=TIMEOUT).tags or []
        except HfHubHTTPError:
            raise
        except Exception as error:  # no network, or HF_HUB_OFFLINE: use what is in the cache
            unreachable = error
        request["local_files_only"] = unreachable is not None
        patterns = FETCHED if unreachable else DESCRIPTION
        folder = Path(huggingface_hub.snapshot_download(**request, allow_patterns=list(patterns)))
        _refuse_code(name, folder, tags)
        if not unreachable:
            huggingface_hub.snapshot_download(**request, allow_patterns=list(FETCHED))
    except UserError:
        raise
    except Exception as error:  # errors of the hub, the network and the system
        cached = " and is not in the cache" if unreachable else ""
        raise UserError(
            f"hf-hub:{name} cannot be fetched ({_reason(unreachable or error)}){cached}: check the "
            "name, the network and `hf auth login`, or pass a local folder."
        ) from error
    if not any((folder / file).is_file() for file in WEIGHTS):
        raise UserError(
            f"hf-hub:{name} holds no {WEIGHTS[0]}, and no pickle is read from the hub: ask its owner for safetensors."
        )
    return folder


def _refuse_code(name: str, folder: Path, tags: list[str]) -> None:
    """Refuse a repository whose configuration or tags ask to run its own code, before its weights are fetched."""
    requests = ["the tag custom_code"] if "custom_code" in tags else []
    for file in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(file.read_text())
        except ValueError:
            continue
        if isinstance(content, dict):
            requests += [f"{key} in {file.name}" for key in CODE_KEYS if content.get(key)]
            if file.name == "config.json" and (scripts := re.findall(r'"([^"]*\.py)"', file.read_text())):
                requests.append(f"{', '.join(scripts)} in config.json")
    if "custom_code" in _card_tags(folder):
        requests.append("the tag custom_code in README.md")
    if requests:
        raise UserError(
            f"hf-hub:{name} asks for code of its own ({', '.join(requests)}), which is never run: choose another model."
        )


def _card_tags(folder: Path) -> list[str]:
    """Return the tags in the header of the model card."""
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    with suppress(yaml.YAMLError):
        header = yaml.safe_load(text.split("\n---")[0]) if text.startswith("---") else None
        return list(map(str, header.get("tags") or [])) if isinstance(header, dict) else []
    return []


def _check_name(repository: str, argument: str) -> None:
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"{argument} names no repository: write OWNER/NAME with letters, digits, '-', '_' and '.'.")


def _reason(error: Exception) -> str:
    """Return the reason of an error in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {401: "401: not logged in, or there is no such repository", 403: "403: the token does not allow this"}
    known |= {404: "404: there is no such repository or revision"}
    return known.get(status or 0) or f"{type(error).__name__}: {reason_of(error)[:100]}"


def upload(folder: Path, to: str, private: bool) -> str:
    """Commit the files of a folder to a repository, and delete other files that mimkit pushed there earlier.

    Args:
        folder: the files to push; only those that match `PUSHED` are uploaded.
        to: repository, OWNER/NAME. It is created if it does not exist.
        private: create the repository as a private one.

    Returns:
        The address of the repository.

    Raises:
        UserError: there is no token, no network, or no permission to write there.
    """
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    check_target(to)
    if not huggingface_hub.get_token():
        raise UserError(f"--to {to} needs a token of the hub, but there is none: run `hf auth login`, or set HF_TOKEN.")
    disable_progress_bars()
    api, ours = huggingface_hub.HfApi(), list(PUSHED)
    try:
        with suppress(RepositoryNotFoundError):  # this request has a timeout, which the ones below have not
            api.model_info(to, revision=None, timeout=TIMEOUT)
        url = api.create_repo(to, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=to, folder_path=folder, commit_message="Pushed by mimkit", allow_patterns=ours, delete_patterns=ours
        )
    except Exception as error:  # errors of the hub, the network and the system
        raise UserError(
            f"--to {to} cannot be pushed to ({_reason(error)}): check the owner, the network and `hf auth login`."
        ) from error
    return str(url)


def check_target(to: str) -> None:
    """Refuse a `--to` that is not OWNER/NAME."""
    _check_name(to, f"--to {to}")
