//! Real servers, real daemons, real faults: what the end-to-end tests in `tests/it` are written with.
//!
//! * [`process`]  – children that cannot outlive the test; signals; a look into /proc.
//! * [`postgres`] – one PostgreSQL server: start, stop, kill as a power cut does, log, clock offset.
//! * [`session`]  – one connection, with SQL in and text out.
//! * [`daemon`]   – one `anabranch run`, and the other commands of the program.
//! * [`disk`]     – a disk of its own that loses power, is full, hangs.
//! * [`proxy`]    – TCP between daemons that a test may cut, stall and mend.
//! * [`network`]  – a network namespace for each node, and a bridge between them.
//! * [`cluster`]  – servers, daemons and proxies put together; convergence; partitions.
//! * [`rows`]     – are the rows of all nodes equal, and if not, where do they differ.
//! * [`conflicts`]– the conflict log as values.
//! * [`load`]     – random clients, and the accounting of every write they were promised.
//! * [`certs`]    – a throwaway certificate authority.
//! * [`wait`]     – polling with a generous deadline.
//!
//! Nothing here asserts how long something takes: deadlines only end a test that hangs.

pub mod certs;
pub mod cluster;
pub mod conflicts;
pub mod daemon;
pub mod disk;
pub mod http;
pub mod join;
pub mod load;
pub mod network;
pub mod pglogical;
pub mod postgres;
pub mod preload;
pub mod process;
pub mod proxy;
pub mod rows;
pub mod session;
pub mod set_clock;
pub mod wait;

pub use cluster::{Builder, Cluster};
pub use conflicts::Conflict;
pub use postgres::Postgres;
pub use session::Session;
