"""The arms of the comparison: every line of a report is one of these, trained by one loop."""

from mopcompress.recover import eora, gated_paths, ia3, idp, input_prompts, lora, norms, prefix, prompts, routed
from mopcompress.recover.start import Arm

ARMS: dict[str, Arm] = {
    "single": Arm(prompts.build, prompts.begin),
    "mop": Arm(prompts.build, prompts.begin),
    "uniform": Arm(prompts.build, prompts.begin),
    "oracle": Arm(prompts.build, prompts.begin),
    "shuffled": Arm(prompts.build, prompts.begin),
    "idp": Arm(idp.build, idp.begin),
    "input": Arm(input_prompts.build, input_prompts.begin),
    "smop": Arm(routed.build, routed.begin),
    "prefix": Arm(prefix.build, prefix.begin),
    "lora": Arm(lora.build, lora.begin),
    "masklora": Arm(lora.build, lora.begin),
    "eora": Arm(lora.build, eora.begin),
    "ia3": Arm(ia3.build, ia3.begin),
    "norms": Arm(norms.build, norms.begin),
    "mop+": Arm(gated_paths.build, gated_paths.begin),
}
