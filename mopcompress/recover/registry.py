"""The arms of the comparison: every line of a report is one of these, trained by one loop."""

from mopcompress.recover.adapter import Arm
from mopcompress.recover.methods import (
    eora,
    ia3,
    idp,
    lora,
    mixture_of_prompts,
    mop_plus,
    norm_tuning,
    prefix_tuning,
    prompt_tuning,
    smop,
)

ARMS: dict[str, Arm] = {
    "single": Arm(mixture_of_prompts.build, mixture_of_prompts.begin),
    "mop": Arm(mixture_of_prompts.build, mixture_of_prompts.begin),
    "uniform": Arm(mixture_of_prompts.build, mixture_of_prompts.begin),
    "oracle": Arm(mixture_of_prompts.build, mixture_of_prompts.begin),
    "shuffled": Arm(mixture_of_prompts.build, mixture_of_prompts.begin),
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
