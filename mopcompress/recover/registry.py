"""The arms of the comparison: every line of a report is one of these, trained by one loop."""

from mopcompress.recover.methods import (
    eora,
    ia3,
    idp,
    lora,
    mop_plus,
    norm_tuning,
    prefix_tuning,
    prompt_initialization,
    prompt_tuning,
    smop,
)
from mopcompress.recover.start import Arm

ARMS: dict[str, Arm] = {
    "single": Arm(prompt_initialization.build, prompt_initialization.begin),
    "mop": Arm(prompt_initialization.build, prompt_initialization.begin),
    "uniform": Arm(prompt_initialization.build, prompt_initialization.begin),
    "oracle": Arm(prompt_initialization.build, prompt_initialization.begin),
    "shuffled": Arm(prompt_initialization.build, prompt_initialization.begin),
    "idp": Arm(idp.build, idp.begin),
    "input": Arm(prompt_tuning.build, prompt_tuning.begin),
    "smop": Arm(smop.build, smop.begin),
    "prefix": Arm(prefix_tuning.build, prefix_tuning.begin),
    "lora": Arm(lora.build, lora.begin),
    "masklora": Arm(lora.build, lora.begin),
    "eora": Arm(lora.build, eora.begin),
    "ia3": Arm(ia3.build, ia3.begin),
    "norms": Arm(norm_tuning.build, norm_tuning.begin),
    "mop+": Arm(mop_plus.build, mop_plus.begin),
}
