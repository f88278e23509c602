"""Write [mem] vectors as a folder or a Hub repository, and read them from there.

vectors.mem.safetensors   the file that `MemVectors.save` writes
README.md                 the card: base model and its licence, certificate, how to decode, and a
                          warning that the vectors contain the text
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from memvec import plugins
from memvec.errors import MemvecError, first_line, printable
from memvec.loading import POCKET
from memvec.writing import make_folder, path_of, write_atomically

if TYPE_CHECKING:
    from memvec.vectors import MemVectors

FILE = "vectors.mem.safetensors"
CARD = "README.md"
HUB_ID = re.compile(r"\b[\w.-]+\b/\b[\w.-]+\b")  # no ./folder or ../folder
# The base class of errors of the Hub's HTTP library, which depends on the release.
UNREACHABLE: type[Exception] = HfHubHTTPError.__bases__[0]
WARNING = (
    "**These vectors contain the text.** Whoever has them and the base model reads it back word "
    "for word: they are as confidential, and as copyrighted, as the text itself."
)
BODY = """
# [mem] vectors of {name}

{warning}

Made with memvec: gradient descent moved these input vectors until the frozen model gives the text
back from them.

| | |
|---|---|
{figures}

## Certificate

{certificate}

## How to decode

```python
import memvec

mem = memvec.MemVectors.from_pretrained("{place}")
lm = memvec.load_lm("{name}"{arguments})
print(memvec.decode(lm, mem)[0])
```

or `memvec decode {file} > text`. A passage whose hash differs from the crammed one is an error:
wrong text is never printed.

## Licence

{licences}
The rights in the text are those of the text.
"""


def save_pretrained(
    mem: MemVectors,
    folder: str | os.PathLike[str],
    *,
    repository: str | None = None,
    licence: str | None = None,
    base_licence: str | None = None,
    force: bool = False,
) -> Path:
    """Write the vectors and their card into a folder, which is created if it does not exist.

    Paths in the file's header are replaced by their last parts, because the rest is private.
    `licence` is the licence of the vectors (an identifier of the Hub). `base_licence` is that of
    the base model; give it if the model's card is not on this machine. Raises MemvecError if the
    folder already holds vectors or another card (unless `force`), or cannot be written.
    """
    place = make_folder(folder)
    if not force and (place / CARD).exists() and not _is_ours(place / CARD):
        raise MemvecError(
            f"{place / CARD} is not a card of vectors: name another folder, or use force."
        )
    text = card(mem, repository=repository, licence=licence, base_licence=base_licence)
    without_paths(mem).save(place / FILE, force=force)
    write_atomically(place / CARD, text.encode())
    return place


def without_paths(mem: MemVectors) -> MemVectors:
    """The same vectors; in the header, paths of files and folders are replaced by their names."""
    header, recipe = mem.header, dict(mem.header.recipe)
    files = {"queries", "neighbours"}
    files |= {"trigger"} if str(recipe.get("trigger")).endswith(".safetensors") else set()
    for field in (files | plugins.WITH_ARGUMENTS) & recipe.keys():  # another trigger is a text
        recipe[field] = plugins.without_folders(recipe[field], field in files)
    update = {
        "model": {**header.model, "name": _base(mem)[0]},
        "recipe": recipe,
        "documents": [d.model_copy(update={"name": Path(d.name).name}) for d in header.documents],
    }
    return type(mem)(mem.vectors, header.model_copy(update=update), mem.soft)


def _is_ours(card: Path) -> bool:
    """True for a card that `save_pretrained` wrote."""
    try:
        return bool(huggingface_hub.metadata_load(card).get("library_name") == "memvec")
    except (ValueError, AttributeError, OSError, yaml.YAMLError):
        return False


def local_file(
    name: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """The file of vectors in a folder that `save_pretrained` wrote, or in a repository of the Hub.

    Raises MemvecError if there is no such folder, repository or file, or no network.
    """
    folder = path_of(name)
    if folder.is_dir():
        if revision is not None:
            raise MemvecError(f"{folder} is a folder here: only the Hub has a revision of it.")
        if not (folder / FILE).is_file():
            raise MemvecError(f"there are no [mem] vectors in {folder}: it has no {FILE}.")
        return folder / FILE
    if not HUB_ID.fullmatch(str(name)):
        raise MemvecError(f"there is no folder {folder}, and it is not a Hub id (user/name).")
    with _hub(str(name)):
        file = huggingface_hub.hf_hub_download(str(name), FILE, revision=revision, token=token)
    return Path(file)


def push_to_hub(
    mem: MemVectors,
    repository: str,
    *,
    private: bool | None = None,
    licence: str | None = None,
    base_licence: str | None = None,
    token: str | None = None,
    message: str = "[mem] vectors made with memvec",
) -> str:
    """Upload the vectors and their card; returns the URL of the commit.

    The repository is created if it does not exist; `private` None uses the Hub's default. Raises
    MemvecError if `repository` is not a Hub id, or without network or permission.
    """
    if not HUB_ID.fullmatch(repository):
        raise MemvecError(f"'{repository}' is not a Hub id: write user/name.")
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        if base_licence is None:
            base_licence = licence_of(mem) or _licence_on_hub(api, mem)
        save_pretrained(
            mem, folder, repository=repository, licence=licence, base_licence=base_licence
        )
        with _hub(repository):
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message
            )
    return str(commit.commit_url)


# ---------------------------------------------------------------------- the card


def card(
    mem: MemVectors,
    *,
    repository: str | None = None,
    licence: str | None = None,
    base_licence: str | None = None,
) -> str:
    """The card of a file, in Markdown with the Hub's metadata. It quotes nothing of the text.

    `repository` is the Hub id for its decoding example; for the licences see `save_pretrained`.
    """
    name, on_hub = _base(mem)
    data = ModelCardData(
        library_name="memvec",
        tags=["mem-vectors"],
        base_model=name if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        license=licence,
    )
    body = BODY.format(
        name=_shown(name),
        warning=WARNING,
        figures=_figures(mem),
        certificate=_certificate(mem),
        place=repository or "FOLDER",
        arguments=_arguments(mem.header.model),
        file=FILE,
        licences=_licences(licence, base_licence or licence_of(mem)),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _figures(mem: MemVectors) -> str:
    """The rows of the card's table."""
    s, header = mem.summary(), mem.header
    named = (_base(mem)[0], header.model["weights"], header.model.get("revision") or "")
    name, weights, revision = map(_shown, named)
    rows = {
        "base model": f"`{name}`" + (f", revision `{revision}`" if revision else ""),
        "weights of the base model": f"SHA-256 of its embeddings `{weights[:16]}…`",
        "texts": f"{s['documents']}, {s['text_bytes']} bytes",
        "passages": f"{s['passages']} of {s['vectors_per_passage']} vectors, D {s['width']}, "
        f"{s['storage']}",
        "layout": f"{s['layout']}, start rule `{s['start_rule']}`"
        + (", BOS in front" if s["front"] == "bos" else ""),
        "tokens": f"{s['tokens']}, {s['tokens_per_vector']:.1f} per vector",
        "information gain": f"{s['information_gain_bits']:.0f} bits, "
        f"{s['bits_per_vector']:.0f} per vector",
        "bytes of the vectors": f"{s['vector_bytes']}",
        "the text itself is in the file too": ("no", "yes")[any(d.text for d in header.documents)],
    }
    return "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def _licences(licence: str | None, base_licence: str | None) -> str:
    base = f"`{_shown(base_licence)}`" if base_licence else "not known here: see its own page"
    given = f"These vectors are published under `{licence}`."
    vectors = given if licence else "No licence is given for these vectors."
    return f"The base model's licence is {base}.\n{vectors}"


def licence_of(mem: MemVectors) -> str | None:
    """The licence that the base model's own card names, if that card is on this machine."""
    name = str(mem.header.model.get("name"))
    folder = POCKET if name == "pocket" else path_of(name)
    file: Any = folder / CARD
    if not file.is_file() and HUB_ID.fullmatch(name):
        revision = mem.header.model.get("revision")
        file = huggingface_hub.try_to_load_from_cache(name, CARD, revision=revision)
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return None
    try:
        return _licence_in(huggingface_hub.metadata_load(file))
    except (ValueError, yaml.YAMLError):  # a damaged card names no licence
        return None


def _licence_on_hub(api: huggingface_hub.HfApi, mem: MemVectors) -> str | None:
    name, on_hub = _base(mem)
    if not on_hub:
        return None
    try:
        with _hub(name):
            return _licence_in(api.model_info(name).card_data)
    except MemvecError:  # gated or deleted: the card then names no licence
        return None


def _licence_in(metadata: Any) -> str | None:
    """The licence in a card's metadata: its `license_name` if the identifier is 'other'."""
    if metadata is None:
        return None
    licence = metadata.get("license")
    if licence == "other":
        licence = metadata.get("license_name") or licence
    return licence if isinstance(licence, str) else None


def _base(mem: MemVectors) -> tuple[str, bool]:
    """The base model's name for publication, and whether it is a Hub id.

    For a local folder, only the last part of its path, since the rest is private.
    """
    name = str(mem.header.model.get("name"))
    if name != "pocket" and (path_of(name).exists() or not HUB_ID.fullmatch(name)):
        return Path(name).name, False
    return name, name != "pocket"


def _arguments(model: dict[str, Any]) -> str:
    named = {name: model.get(name) for name in ("revision", "dtype", "quantize")}
    return "".join(f', {name}="{_shown(value)}"' for name, value in named.items() if value)


def _certificate(mem: MemVectors) -> str:
    c = mem.header.certificate
    if c is None:
        return "None: these vectors were not decoded as a whole after they were made."
    return ("Exact: " if c.get("exact") else "**Not exact**: ") + _shown(
        f"{c.get('exact_passages')} of {c.get('passages')} passages came back, every token, by "
        f"greedy decoding from the stored vectors alone; in {c.get('decoded_in')} on "
        f"{c.get('device')}, {c.get('attention')} attention, batches of {c.get('batch')}, torch "
        f"{c.get('torch')}, transformers {c.get('transformers')}, {c.get('date')}."
    )


def _shown(claim: object) -> str:
    """A text from a file; '_' replaces the special characters of Markdown, HTML and Python."""
    return re.sub(r'[`|<>"\\\[\]]', "_", printable(str(claim)))


@contextlib.contextmanager
def _hub(name: str) -> Iterator[None]:
    """Context manager that turns errors of the Hub into MemvecErrors of one sentence."""
    no_answer = MemvecError(
        f"the Hub could not be reached for {name}: check the network, or use a local folder."
    )
    try:
        yield
    except RepositoryNotFoundError:
        raise MemvecError(
            f"there is no repository {name} on the Hub that you may see: check the name, or log in."
        ) from None
    except RevisionNotFoundError:
        raise MemvecError(f"{name} has no such revision on the Hub.") from None
    except LocalEntryNotFoundError:
        raise no_answer from None
    except EntryNotFoundError:
        raise MemvecError(f"{name} has no {FILE}: it holds no [mem] vectors.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise MemvecError(
            f"the Hub refused {name} ({status}): check that you are logged in and may write there."
        ) from None
    except (ConnectionError, UNREACHABLE):
        raise no_answer from None
    except (HFValidationError, OSError) as error:
        raise MemvecError(f"the Hub could not serve {name}: {first_line(error)}.") from None
