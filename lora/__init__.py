"""LoRA fine-tuning of PT-DiT: `accelerate launch -m lora.train --config lora/configs/24gb.yaml --data DIR`."""
