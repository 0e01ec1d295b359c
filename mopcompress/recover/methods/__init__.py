"""Recovery methods: what can be trained on a compressed, frozen model.

Each method's module has `build(model, config)`, which makes an adapter in its shapes, and
`initialize(config, inputs, init)`, which gives it the values before its first step.

- `mixture_of_prompts`: `mop` and its controls `single`, `uniform`, `oracle`, `shuffled` (Dun et al., 2310.02842).
- `idp`: the group of prompts with the most attention (Hoang et al., 2310.00867).
- `prompt_tuning`: `input`, a prompt at the embedding (Xu et al., 2305.11186; Lester et al., 2104.08691).
- `smop`: short routed prompts at the embedding (Choi et al., EMNLP 2023).
- `prefix_tuning`: `prefix`, keys and values in every layer (Li and Liang, 2101.00190).
- `lora`: `lora` (Hu et al., 2106.09685), and `masklora`, which keeps zeros (Zimmer et al., 2312.15230).
- `eora`: LoRA's factors in closed form (Liu et al., 2410.21271).
- `ia3`: scaled keys, values and neurons (Liu et al., 2205.05638).
- `norm_tuning`: `norms`, the weights of the norms (Zimmer et al., 2312.15230).
- `mop_plus`: `mop+`, norms, neurons and gated low-rank paths (ours, beyond the paper).

They share these parts:

- `gate`: the network that reads an instruction and weighs the experts (Dun et al., 2310.02842).
- `expert_weights`: log weights of experts, and the modes in which they act in attention.
- `prompt_initialization`: first prompts, and the experts' domains (k-means++: Arthur and Vassilvitskii, 2007).
- `prompt_kv`: keys and values of prompts, recorded from the network or trained per layer.
- `module_patches`: adapters that change what single modules compute.
- `target_linears`: the linears of a model by their role.
"""
