"""LoRA beside the trainer's methods on the same work: `python -m tests.lora --help`."""

from tests.lora.compare import main

if __name__ == "__main__":
    main()
