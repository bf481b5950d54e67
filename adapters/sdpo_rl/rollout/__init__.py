"""A rollout → the teacher's prompts: feedback, demonstrations, reprompts. Imports the core and `config` alone."""
