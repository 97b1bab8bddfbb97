"""Runs in vLLM's environment: log-probabilities of prompts and greedy continuations, model by model."""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

PLAIN = {"dtype": "float32", "enforce_eager": True, "distributed_executor_backend": "uni"}


def ask(model: str, rows: list[list[int]], new_tokens: int, options: dict) -> list[dict]:
    llm = LLM(model=model, max_model_len=256, **options)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
    return [{"log_probabilities": [next(iter(step.values())).logprob for step in output.prompt_logprobs[1:]],
             "tokens": list(output.outputs[0].token_ids)} for output in outputs]


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    options = job.get("options", PLAIN)
    answers = {name: ask(model, job["rows"], job["new_tokens"], options) for name, model in job["models"].items()}
    Path(sys.argv[2]).write_text(json.dumps(answers))
