"""Runs that papers report. README.md says which, what differs, and which are left out."""

# Alpaca's prompts (https://github.com/tatsu-lab/stanford_alpaca), which later runs took over.
INSTRUCTION = (  # % the name of the instruction's column
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{%s}\n\n### Response:"
)
