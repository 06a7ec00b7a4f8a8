"""What vLLM makes of an exported folder, unmodified: `PYTHON tests/peers/in_vllm.py FOLDER ASKED NEW`, by vLLM's interpreter.

ASKED is a file with a JSON list of texts, of ids and of conversations. Of each: its ids, the log-probability of each but the
first, NEW greedy tokens at most, and why they end.
"""

import json
import sys


def main(folder: str, path: str, new: str) -> None:
    from vllm import LLM, SamplingParams

    with open(path) as file:
        asked = json.load(file)
    model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4)
    how, found = SamplingParams(temperature=0, max_tokens=int(new), prompt_logprobs=0), []
    for one in asked:
        is_ids = isinstance(one, list) and isinstance(one[0], int)
        given = {"prompt_token_ids": one} if is_ids else one
        [said] = model.generate([given], how) if is_ids or isinstance(one, str) else model.chat([one], how)
        ids, [written] = said.prompt_token_ids, said.outputs
        sure = [each[token].logprob for token, each in zip(ids[1:], said.prompt_logprobs[1:], strict=True)]
        found.append([ids, sure, list(written.token_ids), written.finish_reason])
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
