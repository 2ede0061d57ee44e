"""Windows of the network's input over clips, in blocks of equal size, for scoring.

A block does not depend on the process that makes it, so neither do scores on the number of processes.
Letters: W windows of a block, N clips, T frames, F mel bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asit.audio.fbank import FrontEnd
from asit.audio.windowing import window_counts, window_start
from asit.config import FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.data.loading.loader import KeyedDataset
from asit.data.loading.waveforms import WaveformReader
from asit.errors import AudioError


@dataclass(frozen=True)
class WindowBlock:
    """Windows that are scored together.

    Attributes:
        x: (W, 1, T, F) normalised log-mel; W may be 0.
        owner: (W,) the clip of each window, as an index into the chosen rows.
        failures: (clip, problem) for each window that could not be read.
    """

    x: Tensor
    owner: npt.NDArray[np.int64]
    failures: list[tuple[int, str]]


class Windows(KeyedDataset[WindowBlock]):
    """Blocks of windows over the chosen clips.

    A clip up to the input's length is one window, padded by the front end's rule. A longer one is split into windows a
    hop apart; the last one is moved back to end with the clip.

    Args:
        catalogue: the recordings.
        rows: which of them, in the order of the scores.
        settings: waveform to log-mel; mean and std are numbers.
        frames: T.
        overlap: of neighbouring windows, as a share of the window.
        block: windows in a block.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        rows: npt.NDArray[np.int64],
        settings: FrontEndSettings,
        frames: int,
        overlap: float,
        block: int,
    ) -> None:
        self.catalogue, self.rows, self.frames, self.block = catalogue, rows, frames, block
        self.front_end, self.waveforms = FrontEnd(settings), WaveformReader(settings)
        samples = self.front_end.samples_for(frames)
        self.span = samples / settings.rate
        self.hop = self.span * (1.0 - overlap)
        # Counted in samples, as `asit tag` does: in seconds, rounding would decide for lengths just above a window.
        lengths = np.rint(catalogue.seconds[rows].astype(np.float64) * settings.rate)
        # Half a hop of the log-mel is no reason for another window.
        self.counts = window_counts(lengths, samples, samples * (1.0 - overlap), self.front_end.shift / 2)
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return -(-int(self._ends[-1]) // self.block) if len(self._ends) else 0

    def done(self, blocks: int) -> int:
        """Return the number of clips whose windows are all within the first `blocks` blocks."""
        return int(np.searchsorted(self._ends, blocks * self.block, side="right"))

    def __getitem__(self, block: int) -> WindowBlock:
        first = block * self.block
        numbers = np.arange(first, min(first + self.block, int(self._ends[-1])))
        owners = np.searchsorted(self._ends, numbers, side="right")
        if self.catalogue.column("shard") is not None:
            self.waveforms.fetch(self.catalogue[int(self.rows[owner])] for owner in np.unique(owners))
        inputs, kept, failures = [], [], []
        for number, owner in zip(numbers.tolist(), owners.tolist(), strict=True):
            window = number - int(self._ends[owner]) + int(self.counts[owner])
            try:
                inputs.append(self._window(owner, window))
                kept.append(owner)
            except AudioError as error:
                failures.append((owner, error.found))
        empty = torch.zeros(0, self.frames, self.front_end.settings.mels)
        x = torch.stack(inputs) if inputs else empty
        return WindowBlock(x.unsqueeze(1), np.array(kept, np.int64), failures)

    def _window(self, owner: int, window: int) -> Tensor:
        clip = self.catalogue[int(self.rows[owner])]
        begin = window_start(window, int(self.counts[owner]), clip.seconds, self.span, self.hop)
        wave = self.waveforms.read(clip, begin, min(self.span, clip.seconds))
        samples = self.front_end.samples_for(self.frames)
        x = self.front_end.pad(torch.from_numpy(wave), samples)[:samples]
        return self.front_end.normalise(self.front_end.pad_frames(self.front_end.fbank(x[None])[0], self.frames))
