"""What people look at: panels, tables and plots."""
