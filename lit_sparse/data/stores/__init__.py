"""Token stores: text, tables and conversations, tokenised once, mapped into memory ever after."""
