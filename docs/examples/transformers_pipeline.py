"""Use a compressed model and its adapter in a transformers pipeline, and save the two as one model.

Run it with `python docs/examples/transformers_pipeline.py BASE ADAPTER OUTPUT_FOLDER`,
where `mopcompress prune` wrote BASE and `mopcompress recover` wrote ADAPTER.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from mopcompress import MopForCausalLM  # also registers the model type with transformers' Auto classes

base, adapter, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
model = MopForCausalLM.from_pretrained(base, adapter)

chat = [{"role": "user", "content": "Write the word 'cat' backwards."}]
prompt = chat if tokenizer.chat_template else chat[0]["content"]
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(generate(prompt, max_new_tokens=24, do_sample=False)[0]["generated_text"])

model.save_pretrained(output)  # base and adapter in one folder of safetensors
tokenizer.save_pretrained(output)
print(type(AutoModelForCausalLM.from_pretrained(output)).__name__, "loaded from", output)
