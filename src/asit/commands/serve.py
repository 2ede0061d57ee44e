"""The verb serve."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from asit.terminal.options import Device, OptionalModel, Precision, model_or_included, parse

if TYPE_CHECKING:
    from asit.serve.guard import Guard
    from asit.serve.request_queue import RequestLimits

log = logging.getLogger(__name__)


@dataclass
class ServeOptions:
    model: OptionalModel = None
    index: str | None = None
    """Folder that asit index wrote with this model: the page then shows the nearest of its recordings."""
    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1 is reached from this machine alone, 0.0.0.0 from all of the network."""
    port: int = 8000
    """Port; 0: any free one."""
    allow_host: tuple[str, ...] = ()
    """Further host names under which the page may be opened, such as that of a proxy in front."""
    allow_origin: tuple[str, ...] = ()
    """Other sites whose pages may use the API, such as https://example.org; '*': any site."""
    max_mb: float = 50.0
    """Largest upload, in megabytes."""
    max_seconds: float = 600.0
    """Longest recording."""
    concurrency: int = 2
    """Recordings computed at once."""
    waiting: int = 128
    """Further requests that may wait; more are refused with 503."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of each computation; 0: the cores divided by the concurrency."""
    device: Device = "auto"
    precision: Precision = "auto"
    open: bool = False
    """Open the page in the browser."""


def serve(prog: str, summary: str, given: list[str]) -> int:
    options = parse(ServeOptions, prog, summary, given)
    from asit.serve import server
    from asit.serve.request_queue import RequestLimits

    server.need_extra()
    limits = RequestLimits(
        megabytes=options.max_mb,
        seconds=options.max_seconds,
        concurrency=options.concurrency,
        waiting=options.waiting,
        compute=max(RequestLimits.compute, options.max_seconds),  # longer recordings take longer
    )
    listening = server.listen(options.host, options.port)
    with listening:
        source = _source(options)
        app = _application(options, source, limits)
        address = server.address(listening)
        print(f"asit serves {source} at {address} (Ctrl-C stops it)", flush=True)
        if not app.local:
            log.warning(
                f"{options.host} can be reached from other machines: anyone there can use the model\n"
                "and play the indexed recordings, without a password or encryption"
            )
        if options.open:
            import webbrowser

            webbrowser.open(address)
        server.run(app, listening)
    return 0


def _source(options: ServeOptions) -> str:
    """Return the model to serve: the one that was named, else the index's, else the one that is part of asit."""
    if options.model is None and options.index is not None:
        from asit.search import Index

        return model_or_included(Index.read(options.index).card["model"]["path"])
    return model_or_included(options.model)


def _application(options: ServeOptions, source: str, limits: RequestLimits) -> Guard:
    import torch

    import asit
    from asit.io.child_process import usable_cpus
    from asit.runtime import world
    from asit.search import Index
    from asit.serve.analysis import Analyser
    from asit.serve.app import application

    threads = options.threads or max(1, usable_cpus() // options.concurrency)
    with world(options.device) as here:
        model = asit.load(source, device=here.device)
    index = None if options.index is None else Index.read(options.index)
    name = Path(source).name
    if name == "model" and Path(source).is_dir():
        name = Path(source).resolve().parent.name  # RUN/model is known by its run
    analyser = Analyser(model, name, index, options.precision)
    # A thread of its own counts its own threads of arithmetic.
    return application(
        analyser,
        limits,
        host=options.host,
        names=options.allow_host,
        origins=options.allow_origin,
        prepare=lambda: torch.set_num_threads(threads),
    )
