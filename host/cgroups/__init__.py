"""Control groups (Linux cgroups, v1 and v2): resident memory, threads and processor time of each
inferlet, of all together, and the server's precedence over them.

Knows nothing of seats, quotas or messages. `groups.py` is what others use.
"""

from .detect import Detection, detect
from .groups import Fault, Group, Groups
from .limits import GroupLimits, GroupUsage
from .nice import give_way
from .places import Missing

__all__ = [
    "Detection",
    "Fault",
    "Group",
    "GroupLimits",
    "GroupUsage",
    "Groups",
    "Missing",
    "detect",
    "give_way",
]
