"""What training gives."""

from dataclasses import dataclass

from mopcompress.recover.adapter import Adapter, AdapterConfig
from mopcompress.recover.standing import TrainRow


@dataclass(frozen=True)
class Recovered:
    """A trained adapter, and how it was trained."""

    adapter: Adapter
    config: AdapterConfig
    rows: list[TrainRow]
    seconds: float  # the start (gate pre-training included) and all steps; not the shared cache of lower states
