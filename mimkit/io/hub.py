"""The Hugging Face hub: a name becomes a folder, a folder becomes a repository. Only JSON and safetensors cross."""

import json
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from mimkit.errors import UserError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
CODE = ("auto_map", "custom_pipelines")  # keys by which a configuration asks for code of its own
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
SMALL = ("*.json", "README.md")  # what tells whether a repository asks for code
FETCHED = (*SMALL, "*.safetensors")
DENSE = ("segmenter.json", "detector.json")
PUSHED = ("README.md", "config.json", *DENSE, *WEIGHTS, "report.json", "curves.png", "reconstructions.png", "decoder/*")
TIMEOUT = 10.0  # s, of the first request, after which nothing is tried again


def local_path(name: str | Path) -> Path:
    """What a model or checkpoint is named by -> where it lies: hf-hub:OWNER/NAME[@REVISION] is fetched.

    Raises:
        UserError: the hub cannot be reached and the cache has it not, there is no such repository, it asks for code of
            its own, or it has no safetensors.
    """
    prefix, _, repository = str(name).partition(":")
    if prefix.lower() in ("hf-hub", "hf_hub"):  # timm takes both
        return _fetched(repository)
    return Path(name).expanduser()


@cache
def _fetched(name: str) -> Path:
    repository, _, revision = name.partition("@")
    _check_name(repository, f"hf-hub:{name}")
    disable_progress_bars()
    asked: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    tags: list[str] = []
    unreachable: Exception | None = None
    try:
        try:
            tags = huggingface_hub.HfApi().model_info(**asked, timeout=TIMEOUT).tags or []
        except HfHubHTTPError:
            raise
        except Exception as error:  # no network, or HF_HUB_OFFLINE: what is in the cache will do
            unreachable = error
        asked["local_files_only"] = unreachable is not None
        first = FETCHED if unreachable else SMALL
        folder = Path(huggingface_hub.snapshot_download(**asked, allow_patterns=list(first)))
        _refuse_code(name, folder, tags)
        if not unreachable:
            huggingface_hub.snapshot_download(**asked, allow_patterns=list(FETCHED))
    except UserError:
        raise
    except Exception as error:  # the hub's, the network's and the system's
        cached = ", and is not in the cache" if unreachable else ""
        raise UserError(
            f"hf-hub:{name} cannot be fetched ({_reason(unreachable or error)}){cached}: check the "
            "name, the network and `hf auth login`, or pass a folder that is here."
        ) from error
    if not any((folder / file).is_file() for file in WEIGHTS):
        raise UserError(
            f"hf-hub:{name} holds no {WEIGHTS[0]}, and no pickle is read from the hub: ask its owner for safetensors."
        )
    return folder


def _refuse_code(name: str, folder: Path, tags: list[str]) -> None:
    """A repository whose configuration or tags ask for code of its own is refused before its weights come."""
    asked = ["the tag custom_code"] if "custom_code" in tags else []
    for file in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(file.read_text())
        except ValueError:
            continue
        if isinstance(content, dict):
            asked += [f"{key} in {file.name}" for key in CODE if content.get(key)]
            if file.name == "config.json" and (named := re.findall(r'"([^"]*\.py)"', file.read_text())):
                asked.append(f"{', '.join(named)} in config.json")
    if "custom_code" in _tags(folder):
        asked.append("the tag custom_code in README.md")
    if asked:
        raise UserError(
            f"hf-hub:{name} asks for code of its own ({', '.join(asked)}), which is never run: choose another model."
        )


def _tags(folder: Path) -> list[str]:
    """Those in the header of a model card."""
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    with suppress(yaml.YAMLError):
        header = yaml.safe_load(text.split("\n---")[0]) if text.startswith("---") else None
        return list(map(str, header.get("tags") or [])) if isinstance(header, dict) else []
    return []


def _check_name(repository: str, given: str) -> None:
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"{given} names no repository: write OWNER/NAME, of letters, digits, '-', '_' and '.'.")


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {401: "401: not logged in, or there is no such repository", 403: "403: the token may not do this"}
    known |= {404: "404: there is no such repository or revision"}
    lines = str(error).strip().splitlines() or [""]
    return known.get(status or 0) or f"{type(error).__name__}: {lines[0][:150]}"


def upload(folder: Path, to: str, private: bool) -> str:
    """What `folder` holds, as a commit to a new or an old repository, whose other files of ours go. -> its address

    Raises:
        UserError: not logged in, no network, no right to write there.
    """
    check_target(to)
    if not huggingface_hub.get_token():
        raise UserError(f"--to {to} needs a token of the hub, and there is none: run `hf auth login`, or set HF_TOKEN.")
    disable_progress_bars()
    api, ours = huggingface_hub.HfApi(), list(PUSHED)
    try:
        with suppress(RepositoryNotFoundError):  # which ends in time where a network swallows what is sent
            api.model_info(to, revision=None, timeout=TIMEOUT)
        url = api.create_repo(to, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=to, folder_path=folder, commit_message="Pushed by mimkit", allow_patterns=ours, delete_patterns=ours
        )
    except Exception as error:  # the hub's, the network's and the system's
        raise UserError(
            f"--to {to} cannot be pushed to ({_reason(error)}): check the owner, the network and `hf auth login`."
        ) from error
    return str(url)


def check_target(to: str) -> None:
    """Refuse what names no repository of an owner."""
    _check_name(to, f"--to {to}")
