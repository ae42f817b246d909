"""Says one word: what a launch costs."""

from inferlet import send

send("hello")
