"""The recovery methods by arm name.

A recovery method is an implementation: it builds and initializes adapters. An arm is a line of a comparison, as in a
clinical trial: one method with one choice of settings, under the name that recipes and reports use. Several arms share
a method and differ in grouping, gate or mask only (`single`, `mop`, `uniform`, ...). All arms are trained by one loop.
"""

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
