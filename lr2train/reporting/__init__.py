"""Parts of the report page and the pictures of searches and corpora: inputs, charts, sections, page."""
