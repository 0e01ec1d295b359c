"""The arms of the comparison: every line of a report is one of these, trained by one loop."""

from mopcompress.recover import idp, prompts
from mopcompress.recover.start import Arm

ARMS: dict[str, Arm] = {
    "single": Arm(prompts.build, prompts.begin),
    "mop": Arm(prompts.build, prompts.begin),
    "uniform": Arm(prompts.build, prompts.begin),
    "oracle": Arm(prompts.build, prompts.begin),
    "shuffled": Arm(prompts.build, prompts.begin),
    "idp": Arm(idp.build, idp.begin),
}
