//! A throwaway certificate authority, made with openssl.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::run;

/// A certificate authority in a folder.
pub struct Authority {
    dir: PathBuf,
}

/// The files of one member.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The member's certificate.
    pub cert: PathBuf,
    /// The member's key.
    pub key: PathBuf,
}

impl Authority {
    /// Makes a new authority; `dir` must not exist.
    pub fn create(dir: &Path) -> Self {
        fs::create_dir(dir).expect("create the authority's folder");
        run(openssl(dir)
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ])
            .args([
                "-days",
                "2",
                "-subj",
                "/CN=test authority",
                "-keyout",
                "ca.key",
                "-out",
                "ca.pem",
            ]));
        Self { dir: dir.to_owned() }
    }

    /// A certificate for a member's name, for both ends of a link.
    pub fn issue(&self, name: &str) -> Certificate {
        let extensions = format!(
            "subjectAltName=DNS:{name}\nextendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=CA:FALSE\n"
        );
        fs::write(self.dir.join(format!("{name}.ext")), extensions).expect("write the extensions");
        run(openssl(&self.dir)
            .args([
                "req",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ])
            .args([
                "-subj",
                &format!("/CN={name}"),
                "-keyout",
                &format!("{name}.key"),
                "-out",
                &format!("{name}.csr"),
            ]));
        run(openssl(&self.dir)
            .args(["x509", "-req", "-days", "2", "-CA", "ca.pem", "-CAkey", "ca.key"])
            .args([
                "-CAcreateserial",
                "-in",
                &format!("{name}.csr"),
                "-extfile",
                &format!("{name}.ext"),
                "-out",
                &format!("{name}.pem"),
            ]));
        Certificate {
            ca: self.dir.join("ca.pem"),
            cert: self.dir.join(format!("{name}.pem")),
            key: self.dir.join(format!("{name}.key")),
        }
    }
}

fn openssl(dir: &Path) -> Command {
    let mut command = Command::new("openssl");
    command.current_dir(dir);
    command
}
