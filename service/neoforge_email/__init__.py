"""NeoForge Email: a company's own transactional e-mail, delivered from its own machines."""
