#!/usr/bin/env python3
"""Greedy continuations of Gemma 3 270M by llama.cpp, with the lead of each chosen token.

    gemma_greedy.py HOST:PORT OUTPUT.json

HOST:PORT is a `llama-server -m MODEL.gguf -np 1` of llama-cpp-python 0.3.36's llama.cpp (CPU). For each
prompt: its tokens, 48 greedy ones after them, and by how much each one's log-probability leads the second.
"""

import json
import sys
import urllib.request

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are",
    "Q: What is the largest planet in the solar system?\nA:",
    "Das Wetter ist heute",
    "1, 1, 2, 3, 5, 8, 13,",
    "To be, or not to be, that is the question:",
]
TOKENS = 48


def ask(server, path, body):
    request = urllib.request.Request(f"http://{server}{path}", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def continuation(server, text):
    prompt = ask(server, "/tokenize", {"content": text, "add_special": True})["tokens"]
    answer = ask(server, "/completion", {
        "prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": 2, "ignore_eos": True,
        "return_tokens": True, "cache_prompt": False, "samplers": ["temperature"]})
    leads = [step["top_logprobs"][0]["logprob"] - step["top_logprobs"][1]["logprob"]
             for step in answer["completion_probabilities"]]
    tokens = [step["id"] for step in answer["completion_probabilities"]]
    assert len(tokens) == len(leads) == TOKENS
    assert all(step["top_logprobs"][0]["id"] == step["id"] for step in answer["completion_probabilities"])
    return {"text": text, "prompt": prompt, "tokens": tokens, "leads": [round(lead, 4) for lead in leads]}


def main():
    server, output = sys.argv[1:]
    with open(output, "w") as file:
        rows = ",\n".join(json.dumps(continuation(server, text)) for text in PROMPTS)
        file.write('{"continuations": [\n' + rows + "\n]}\n")


if __name__ == "__main__":
    main()
