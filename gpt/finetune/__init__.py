"""Teaching a finished model something: adapters beside its weights, classes, instructions, preferences."""
