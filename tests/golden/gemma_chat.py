#!/usr/bin/env python3
"""Chats with Gemma 3 270M by llama.cpp: prompt text and tokens by its own form of Gemma's turns, greedy answers.

    gemma_chat.py HOST:PORT OUTPUT.json

HOST:PORT is a `llama-server -m MODEL.gguf -np 1 --chat-template gemma --no-jinja` of llama-cpp-python 0.3.36's llama.cpp (CPU).
"""

import json
import sys

from gemma_greedy import ask

CHATS = [
    [("user", "What is the capital of France?")],
    [("user", "  knock knock\n"), ("assistant", "Who is there?"), ("user", "Gemma.")],
    [("system", "Answer in one word."), ("user", "What colour is the sky?"), ("assistant", "Blue."),
     ("user", "And grass?")],
    [("user", "Zähle bis fünf: 一, 二 🙂\n\n\tund weiter   bitte")],
]
TOKENS = 24


def chat(server, turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    text = ask(server, "/apply-template", {"messages": messages})["prompt"]
    prompt = ask(server, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
    answer = ask(server, "/completion", {
        "prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": 2, "ignore_eos": True,
        "return_tokens": True, "cache_prompt": False, "samplers": ["temperature"]})
    steps = answer["completion_probabilities"]
    leads = [step["top_logprobs"][0]["logprob"] - step["top_logprobs"][1]["logprob"] for step in steps]
    return {"messages": messages, "text": text, "prompt": prompt, "tokens": [step["id"] for step in steps],
            "leads": [round(lead, 4) for lead in leads]}


def main():
    server, output = sys.argv[1:]
    with open(output, "w") as file:
        rows = ",\n".join(json.dumps(chat(server, turns)) for turns in CHATS)
        file.write('{"chats": [\n' + rows + "\n]}\n")


if __name__ == "__main__":
    main()
