"""Many clients of one model: a scheduler, a cache of prompts, and an OpenAI-compatible server in front of them."""
