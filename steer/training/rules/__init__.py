"""Training rules of flow maps: all rules of the taxonomy, for one network.

`base` defines the interface, `lagrangian`, `eulerian` and `semigroup` have the rules, and `table`
their names. `objective` turns a rule into the loss of a step, with `times`, `weights` and the
derivatives of `along`. `matching` fits the velocity.
"""

from steer.training.rules.matching import FlowMatching, guided_velocity
from steer.training.rules.objective import MapObjective
from steer.training.rules.table import build
from steer.training.rules.times import draw_pair, draw_time

__all__ = [
    "FlowMatching",
    "MapObjective",
    "build",
    "draw_pair",
    "draw_time",
    "guided_velocity",
]
