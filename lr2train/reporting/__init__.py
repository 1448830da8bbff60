"""Parts of the report: what it reads, its charts, its page, its sections."""
