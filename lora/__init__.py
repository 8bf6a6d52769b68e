"""LoRA fine-tuning of PT-DiT: `accelerate launch -m lora.train --config 24gb --data DIR`."""
