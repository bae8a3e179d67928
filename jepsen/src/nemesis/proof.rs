//! That what is done to packets is done to them, and to no others: bytes are sent over lines that are broken in every way, and over those beside
//! them. Before a run, since a fault that does nothing would be survived by everything.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::time::Duration;

use anabranch_tests::network::Seat;
use anabranch_tests::proxy::Mode;

use super::bridge::Bridge;

/// Ports that no node is dialled at.
const FIRST_PORT: u16 = 7_001;

/// How long what must come may take: as long as a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was sent together with something that came would have come within so long.
const AFTER_THE_OTHERS: Duration = Duration::from_millis(50);

/// Every way to break lines that faults use, by who dials whom.
fn ways(nodes: usize) -> Vec<Vec<(usize, usize, Mode)>> {
    let all = |mode: Mode| -> Vec<_> {
        let of = move |from: usize| (0..nodes).map(move |to| (from, to, mode));
        (0..nodes)
            .flat_map(of)
            .filter(|(from, to, _)| from != to)
            .collect()
    };
    vec![
        vec![],
        all(Mode::Stall),
        all(Mode::Cut),
        vec![(0, 1, Mode::Cut), (1, 0, Mode::Cut)],
        vec![(0, 1, Mode::StallRequests), (1, 0, Mode::StallAnswers)],
        vec![(1, 0, Mode::Stall)],
        vec![(0, 1, Mode::StallRequests)],
        vec![(0, 1, Mode::StallAnswers)],
    ]
}

/// Breaks and mends the lines of these seats, between which nothing else runs. Gives what does not do as it says.
pub fn prove(seats: &[Seat]) -> Result<(), String> {
    if seats.len() < 2 {
        return Ok(());
    }
    prove_at(seats, seats)
}

/// The same where only what enters the bridge from some of the seats is looked at.
fn prove_at(seats: &[Seat], looked_at: &[Seat]) -> Result<(), String> {
    let ends = seats.iter().zip(FIRST_PORT..);
    let ends: Vec<_> = ends
        .map(|(seat, port)| SocketAddrV4::new(seat.address(), port))
        .collect();
    let mut bridge = Bridge::new(looked_at.iter().map(Seat::interface), ends.clone())?;
    let listeners = seats.iter().zip(&ends).map(|(seat, end)| {
        let bound = seat.inside(|| TcpListener::bind(end)).and_then(|bound| bound);
        bound.map_err(|error| format!("no port at {end}: {error}"))
    });
    let listeners = listeners.collect::<Result<Vec<_>, _>>()?;
    for way in ways(seats.len()) {
        let mut lines = dial_all(seats, &ends, &listeners)?;
        bridge.set(&way)?;
        for line in &mut lines {
            line.mode = way
                .iter()
                .find(|set| (set.0, set.1) == (line.from, line.to))
                .map_or(Mode::Pass, |set| set.2);
            line.say()?;
        }
        for line in &mut lines {
            line.hear_what_comes()?;
        }
        std::thread::sleep(AFTER_THE_OTHERS);
        for line in &mut lines {
            line.hear_nothing_else()?;
        }
        let broken = !way.is_empty();
        if broken && bridge.met()? == 0 {
            return Err(format!("nft met no packet of {way:?}"));
        }
        if let Some((from, to, _)) = way.iter().find(|(_, _, mode)| *mode == Mode::Cut) {
            refused(seats, &ends, *from, *to)?;
        }
        bridge.set(
            &way.iter()
                .map(|&(from, to, _)| (from, to, Mode::Pass))
                .collect::<Vec<_>>(),
        )?;
        for line in &mut lines {
            line.hear_what_was_held()?;
        }
    }
    // What was mended can be dialled.
    dial_all(seats, &ends, &listeners).map(drop)
}

/// Does somebody who dials get a reset?
fn refused(seats: &[Seat], ends: &[SocketAddrV4], from: usize, to: usize) -> Result<(), String> {
    match dial(seats, ends, from, to) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(format!(
            "n{} dials n{}, and is not refused: {error}",
            from + 1,
            to + 1
        )),
        Ok(_) => Err(format!("n{} reaches n{}, which is cut off", from + 1, to + 1)),
    }
}

fn dial(seats: &[Seat], ends: &[SocketAddrV4], from: usize, to: usize) -> std::io::Result<TcpStream> {
    let (Some(seat), Some(&end)) = (seats.get(from), ends.get(to)) else {
        return Err(ErrorKind::NotFound.into());
    };
    seat.inside(|| TcpStream::connect_timeout(&end.into(), PATIENCE))?
}

/// Every node dials every other one.
fn dial_all(seats: &[Seat], ends: &[SocketAddrV4], listeners: &[TcpListener]) -> Result<Vec<Line>, String> {
    let mut lines = Vec::new();
    for from in 0..seats.len() {
        for (to, listener) in listeners.iter().enumerate().filter(|(to, _)| *to != from) {
            let both = dial(seats, ends, from, to).and_then(|dialler| Ok([dialler, listener.accept()?.0]));
            let [dialler, dialled] =
                both.map_err(|error| format!("n{} dials n{}: {error}", from + 1, to + 1))?;
            lines.push(Line {
                from,
                to,
                dialler,
                dialled,
                mode: Mode::Pass,
            });
        }
    }
    Ok(lines)
}

/// A connection, and what is done to it.
struct Line {
    from: usize,
    to: usize,
    dialler: TcpStream,
    dialled: TcpStream,
    mode: Mode,
}

impl Line {
    /// Do bytes come through to who was dialled, and to who dialled?
    fn passes(&self) -> [bool; 2] {
        match self.mode {
            Mode::StallRequests => [false, true],
            Mode::StallAnswers => [true, false],
            Mode::Pass | Mode::Lossy(_) | Mode::Slow(_) => [true; 2],
            Mode::Cut | Mode::Stall => [false; 2],
        }
    }

    /// Both ends, who was dialled first, as [`Self::passes`] has them.
    fn ends(&mut self) -> [&mut TcpStream; 2] {
        [&mut self.dialled, &mut self.dialler]
    }

    fn wrong(&self, what: &str) -> String {
        format!(
            "the line that n{} dialled to n{} ({:?}): {what}",
            self.from + 1,
            self.to + 1,
            self.mode
        )
    }

    /// One byte from each end. The second may know already that the line is cut.
    fn say(&mut self) -> Result<(), String> {
        let mut wrong = None;
        for end in self.ends() {
            if let Err(error) = end.write_all(b"x")
                && !is_reset(&error)
            {
                wrong = Some(format!("nothing can be written: {error}"));
            }
        }
        wrong.map_or(Ok(()), |what| Err(self.wrong(&what)))
    }

    /// What must come.
    fn hear_what_comes(&mut self) -> Result<(), String> {
        let passes = self.passes();
        let mut wrong = None;
        for (end, _) in self.ends().into_iter().zip(passes).filter(|(_, passes)| *passes) {
            if let Err(error) = read_one(end) {
                wrong = Some(format!("nothing comes: {error}"));
            }
        }
        wrong.map_or(Ok(()), |what| Err(self.wrong(&what)))
    }

    /// What must not: silence, or, if it is cut, a reset at both ends.
    fn hear_nothing_else(&mut self) -> Result<(), String> {
        let (passes, cut) = (self.passes(), self.mode == Mode::Cut);
        let mut wrong = None;
        for (end, _) in self.ends().into_iter().zip(passes).filter(|(_, passes)| !*passes) {
            let found = if cut {
                read_one(end)
            } else {
                end.set_nonblocking(true).and_then(|()| {
                    let read = end.read(&mut [0]);
                    end.set_nonblocking(false)?;
                    read.map(drop)
                })
            };
            match found {
                Err(error) if cut && is_reset(&error) => {}
                Err(error) if !cut && error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => wrong = Some(format!("it should be broken, and says: {error}")),
                Ok(()) => wrong = Some("a byte came through".to_owned()),
            }
        }
        wrong.map_or(Ok(()), |what| Err(self.wrong(&what)))
    }

    /// Once it is mended: what was held back.
    fn hear_what_was_held(&mut self) -> Result<(), String> {
        if self.mode == Mode::Cut {
            return Ok(());
        }
        let passes = self.passes();
        let mut wrong = None;
        for (end, _) in self.ends().into_iter().zip(passes).filter(|(_, passes)| !*passes) {
            if let Err(error) = read_one(end) {
                wrong = Some(format!("mended, and what was held does not come: {error}"));
            }
        }
        wrong.map_or(Ok(()), |what| Err(self.wrong(&what)))
    }
}

/// One byte, within all patience.
fn read_one(end: &mut TcpStream) -> std::io::Result<()> {
    end.set_read_timeout(Some(PATIENCE))?;
    end.read_exact(&mut [0])
}

fn is_reset(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use anabranch_tests::network::Network;

    use super::super::packets;
    use super::*;

    /// Does this, a test of this name, in a namespace of its own: it starts itself there. Nothing where there can be none.
    fn within(name: &str, doing: impl FnOnce(&Network)) {
        if packets::inside() {
            return doing(&Network::start(3).unwrap());
        }
        if packets::impossible().is_some() {
            return;
        }
        let program = std::env::current_exe().unwrap();
        let mut again = packets::within(&program);
        let status = again.args(["--exact", "--nocapture", name]).status().unwrap();
        assert!(status.success(), "{name}: {status}");
    }

    #[test]
    fn what_is_broken_is_broken_and_nothing_else_and_is_mended() {
        within(
            "nemesis::proof::tests::what_is_broken_is_broken_and_nothing_else_and_is_mended",
            |network| {
                prove(network.seats()).unwrap();
                // What was made once can be made again.
                prove(network.seats()).unwrap();
            },
        );
    }

    #[test]
    fn a_bridge_that_does_not_look_at_a_nodes_packets_is_found() {
        within(
            "nemesis::proof::tests::a_bridge_that_does_not_look_at_a_nodes_packets_is_found",
            |network| {
                for blind in 0..network.seats().len() {
                    let mut looked_at = network.seats().to_vec();
                    looked_at.remove(blind);
                    let found = prove_at(network.seats(), &looked_at).unwrap_err();
                    assert!(found.contains("a byte came through"), "{found}");
                }
            },
        );
    }

    #[test]
    fn a_line_that_loses_packets_loses_no_bytes() {
        within(
            "nemesis::proof::tests::a_line_that_loses_packets_loses_no_bytes",
            |network| {
                let seats = network.seats();
                let ends: Vec<_> = seats
                    .iter()
                    .zip(FIRST_PORT..)
                    .map(|(seat, port)| SocketAddrV4::new(seat.address(), port))
                    .collect();
                let listener = seats[1].inside(|| TcpListener::bind(ends[1])).unwrap().unwrap();
                let mut bridge = Bridge::new(seats.iter().map(Seat::interface), ends.clone()).unwrap();
                let mut dialler = dial(seats, &ends, 0, 1).unwrap();
                let mut dialled = listener.accept().unwrap().0;
                bridge.set(&[(0, 1, Mode::Lossy(30))]).unwrap();
                for round in 0..20_u8 {
                    dialler.write_all(&[round]).unwrap();
                    let mut byte = [0];
                    dialled.read_exact(&mut byte).unwrap();
                    assert_eq!(byte, [round]);
                }
                // Forty packets: that none is lost has a chance of one in a million and a half.
                assert!(bridge.met().unwrap() > 0);
            },
        );
    }
}
