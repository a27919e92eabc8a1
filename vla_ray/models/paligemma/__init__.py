"""PaliGemma as an action policy. Empty on purpose: data workers import `processing` and must not pay for torch."""
