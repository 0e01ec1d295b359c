"""The arms of the comparison: every line of a report is one of these, trained by one loop."""

from mopcompress.recover.adapter import RecoveryMethod
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

RECOVERY_METHODS: dict[str, RecoveryMethod] = {
    "single": RecoveryMethod(mixture_of_prompts.build, mixture_of_prompts.initialize),
    "mop": RecoveryMethod(mixture_of_prompts.build, mixture_of_prompts.initialize),
    "uniform": RecoveryMethod(mixture_of_prompts.build, mixture_of_prompts.initialize),
    "oracle": RecoveryMethod(mixture_of_prompts.build, mixture_of_prompts.initialize),
    "shuffled": RecoveryMethod(mixture_of_prompts.build, mixture_of_prompts.initialize),
    "idp": RecoveryMethod(idp.build, idp.initialize),
    "input": RecoveryMethod(prompt_tuning.build, prompt_tuning.initialize),
    "smop": RecoveryMethod(smop.build, smop.initialize),
    "prefix": RecoveryMethod(prefix_tuning.build, prefix_tuning.initialize),
    "lora": RecoveryMethod(lora.build, lora.initialize),
    "masklora": RecoveryMethod(lora.build, lora.initialize),
    "eora": RecoveryMethod(lora.build, eora.initialize),
    "ia3": RecoveryMethod(ia3.build, ia3.initialize),
    "norms": RecoveryMethod(norm_tuning.build, norm_tuning.initialize),
    "mop+": RecoveryMethod(mop_plus.build, mop_plus.initialize),
}
