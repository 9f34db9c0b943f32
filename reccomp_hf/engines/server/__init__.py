"""An OpenAI-compatible HTTP server on starlette and uvicorn; `reccomp-hf serve` runs it."""
