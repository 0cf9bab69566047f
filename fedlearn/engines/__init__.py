"""Export the engines that run in this process. Import other engines from their modules, which load frameworks."""

from typing import TYPE_CHECKING

from fedlearn.core.lazy_names import LazyName, lazy_names
from fedlearn.engines.base import InProcessEngine, serial, vector
from fedlearn.engines.block_training import failure

if TYPE_CHECKING:
    from fedlearn.engines.byzantine import ByzantineEngine
else:
    __getattr__, __dir__ = lazy_names(__name__, {"ByzantineEngine": LazyName("fedlearn.engines.byzantine")})

__all__ = [
    "ByzantineEngine",
    "InProcessEngine",
    "failure",
    "serial",
    "vector",
]
