"""piehost: programmable LLM serving. The folders beside this file are links to the real ones."""
