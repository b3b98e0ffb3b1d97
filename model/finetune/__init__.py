"""Fine-tuning: `LanguageModel.finetune` and `gpukernels finetune`."""
