"""Have the answer be an object of your own class, text of one form, or a call.

    pip install "npqwen[grammar]"
    python examples/structured.py [MODEL]

Tokens that would not fit are never drawn, so the text always has the structure; whether what it says is true is up to
the model. MODEL is a hub id or a directory; the default is the small model beside this file, which was never taught to
answer in JSON: its object is well formed, and guessed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import npqwen

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")


Sky = Literal["sunny", "cloudy", "foggy", "windy"]


@dataclass
class Forecast:
    today: Sky
    tomorrow: Sky


@dataclass
class Report:
    city: Annotated[str, "a name, without the country"]
    forecast: Forecast


def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    return f"sunny in {city}"


def main() -> None:
    with npqwen.load(MODEL, bits=4) as model:
        defined = model.chat("Define river.", regex=r"river \((noun|verb|adjective)\)", thinking=False, temperature=0)
        print(defined.text)

        called = model.chat("What is the weather in Paris?", tools=[get_weather], tool_choice="required", seed=1)
        print([(call.name, call.arguments) for call in called.tool_calls])

        question = "The weather in Paris, today and tomorrow? Answer in JSON with the keys city and forecast."
        reply = model.chat(question, schema=Report, thinking=False, seed=1)
        print(reply.text)
        print(reply.parsed)  # a Report; None if the context had ended before the text


if __name__ == "__main__":
    main()
