"""The registry of public models in models.yaml: facts with their sources, and how each model is obtained."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import Field

from asit.config import yaml
from asit.config.base import Positive, Settings
from asit.data.download import http
from asit.data.download.registry import Archive
from asit.errors import suggestion
from asit.io import lock
from asit.io.local_files import cache_folder

log = logging.getLogger(__name__)

INCLUDED = "asit-small-general"
"""The model that is part of asit, used where no model is named."""
_MODELS = Path(__file__).parents[1] / "models"


class Fact(Settings):
    """What is known of a model."""

    value: str
    """The fact."""
    source: str
    """URL of the page that says so; of a model that is part of asit, its README.md."""


class PublishedScore(Settings):
    """A published result."""

    task: str
    """Data set, with its split or protocol where there are several."""
    metric: str
    """mAP or accuracy, as the source has it, or an average that the source defines."""
    value: float
    """As printed by the source."""
    of: str
    """What was scored: this model, or one that was fine-tuned from it."""
    source: str
    """URL of the page that says so."""


class RegisteredModel(Settings):
    """A public model that `asit.load` knows by a short name.

    It is part of asit (`folder`), or obtained from `repository` or `url`, automatically, or from `page` by hand.
    """

    name: str
    """Short name."""
    title: str
    """Name as the authors have it."""
    family: str
    """Architecture, such as ASiT, AST, EAT."""
    kind: str | None = None
    """`--kind` of `asit convert`; None: it needs no conversion."""
    size: Fact
    """Size of the network."""
    input: Fact
    """Sample rate, mel bins and length of the input."""
    data: Fact
    """What it was trained on."""
    license: Fact | None = None
    """Licence; None: no source states one."""
    scores: tuple[PublishedScore, ...] = ()
    """Published results."""
    page: str
    """The page that offers the weights."""
    file: str | None = None
    """Name of the file of weights."""
    folder: str | None = None
    """Its folder in asit/models, where it is part of asit."""
    repository: str | None = None
    """owner/name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit; None: main."""
    url: str | None = None
    """Direct link to the file."""
    bytes: Positive | None = None
    """Size of the file at `url`, roughly: four bytes a parameter."""
    sha256: str | None = Field(default=None, pattern="[0-9a-f]{64}")
    """Of the file at `url`; None: none is published."""
    by_hand: str | None = None
    """Why asit cannot fetch it."""

    @property
    def automatic(self) -> bool:
        """Whether asit has it, or fetches it."""
        return any(where is not None for where in (self.folder, self.repository, self.url))

    @property
    def folder_path(self) -> Path:
        """The model folder, where it is part of asit."""
        assert self.folder is not None
        return _MODELS / self.folder


class _Registry(Settings):
    """The content of models.yaml."""

    facts: tuple[Fact, ...]
    """Facts that several models share; models refer to them by YAML's anchors."""
    models: tuple[RegisteredModel, ...]


def _read() -> dict[str, RegisteredModel]:
    path = Path(__file__).with_name("models.yaml")
    return {one.name: one for one in yaml.build(_Registry, yaml.read_yaml(path), path.name).models}


MODELS = _read()
"""By short name."""


def list_models() -> list[RegisteredModel]:
    """Return the registry of public models, which `asit.load` takes by name: facts, each with its source."""
    return list(MODELS.values())


def hint(name: str) -> str:
    """Return the suggestion of a similar short name; "" if none is similar."""
    return suggestion(name, MODELS, ", did you mean {}?")


def download(known: RegisteredModel) -> Path:
    """Return the file of a model that has a direct link, downloaded on first use; a broken download is resumed.

    Raises:
        DownloadError: it cannot be downloaded, or has another checksum than the published one.
    """
    assert known.url is not None
    assert known.bytes is not None
    folder = cache_folder("downloads")
    name = known.file or known.url.rpartition("/")[2]
    target = folder / name
    with lock.writing(target, wait=True):  # of several processes one downloads
        if not target.exists():
            log.info(f"Downloading {known.url} (about {known.bytes / 1e6:.0f} MB) to {target}")
        archive = Archive(url=known.url, name=name, size=known.bytes, unpacked=0, recordings=0, sha256=known.sha256)
        return http.fetch(archive, folder)
