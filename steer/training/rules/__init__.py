"""How a flow map is trained: every rule of the taxonomy, on one network.

`base` says what a rule is, `lagrangian`, `eulerian` and `semigroup` have the rules, `table` their
names; `objective` makes one a step's loss, with `times`, `weights` and the derivatives of `along`.
`matching` fits the velocity.
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
