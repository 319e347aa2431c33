"""Let a model call a Python function and answer with its result.

    python examples/tools.py [MODEL] [QUESTION]

The function's signature and docstring become the JSON schema in the prompt. MODEL is a hub id or a
directory; the default is the small model beside this file, which knows one tool.
"""

import sys
from pathlib import Path

import npqwen

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")
QUESTION = sys.argv[2] if len(sys.argv) > 2 else "What is the weather in Paris?"

SKIES = {"Paris": "sunny", "London": "foggy", "Tokyo": "windy"}


def get_weather(city: str) -> dict[str, str | int]:
    """Get the current weather in a city."""
    if city not in SKIES:
        raise LookupError(f"no station in {city}")  # the model reads this as the result
    return {"city": city, "degrees": 17, "sky": SKIES[city]}


def main() -> None:
    with npqwen.load(MODEL, bits=4) as model:
        stream = model.stream_chat(QUESTION, tools=[get_weather], run_tools=True, thinking=False, temperature=0)
        for event in stream:
            match event:
                case npqwen.ToolCall(name, arguments):
                    print(f"calls {name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})")
                case npqwen.ToolResult(_, content):
                    print(f"result: {content}")
                case npqwen.Text(text):
                    print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
