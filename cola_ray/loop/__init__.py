"""The distributed loop: prompts go out, groups come in, the learner is fed, new weights are spread."""
