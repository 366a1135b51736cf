"""A resumable trainer that aligns flow-matching image models by reinforcement learning (Neighbor GRPO)."""
