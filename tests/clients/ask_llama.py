"""Runs with llama.cpp (xllamacpp): greedy continuations of token rows and texts, and what was likeliest at each step.

A text's answer also says how many tokens llama.cpp made of it.
"""

import json
import sys
from pathlib import Path

import xllamacpp


def serve(model: str) -> xllamacpp.Server:
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.fit_params = 256, 1, False, False
    settings.verbosity, settings.cpuparams.n_threads, settings.port = 0, 1, 0
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(settings)


def ask(server: xllamacpp.Server, prompt: list[int] | str, new_tokens: int, likeliest: int) -> dict:
    answer = server.handle_completions({"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True,
                                        "n_probs": likeliest, "cache_prompt": False})
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    steps = answer["choices"][0]["logprobs"]["content"]
    return {"tokens": [step["id"] for step in steps], "prompt_tokens": answer["usage"]["prompt_tokens"],
            "log_probabilities": [{top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in steps]}


if __name__ == "__main__":
    job, found = json.loads(Path(sys.argv[1]).read_text()), {}
    for name, model in job["models"].items():
        running = serve(model)
        found[name] = [ask(running, prompt, job["new_tokens"], job["likeliest"]) for prompt in job["prompts"]]
        del running
    Path(sys.argv[2]).write_text(json.dumps(found))
