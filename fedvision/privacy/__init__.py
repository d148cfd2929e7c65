"""Privacy of patients: gradients clipped patient by patient, noise, what it adds up to, and the ledger."""
